"""Few shots: the heads of `vlm_jax.adapt.heads` on a two-tower model's embeddings, over several draws of pictures."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.adapt import heads
from vlm_jax.config import choose
from vlm_jax.data.sources import open_source
from vlm_jax.errors import UserError
from vlm_jax.evaluators import classes as class_names
from vlm_jax.evaluators.ops import boxed  # noqa: F401 (registered as an op)
from vlm_jax.evaluators.probe import few_shots, only
from vlm_jax.evaluators.progress import Progress, memory_limit
from vlm_jax.evaluators.records import read_fields
from vlm_jax.evaluators.result import Result
from vlm_jax.evaluators.stream import open_pass, stream
from vlm_jax.pretrained import class_embeddings

ALPHAS, BETAS = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0], [0.3, 1.0, 2.0, 3.5, 5.5, 8.0]


def _zero_shot(few, validation):
    return heads.zero_shot(*few[2:])


def _linear_probe(few, validation):
    features, labels, text, _ = few
    build = lambda l2: heads.linear_probe(features, labels, len(text), l2)
    return heads.choose(build, {"l2": [0.1, 0.3, 1.0, 3.0, 10.0]}, *validation).head


def _gda(few, validation):
    grid = {"alpha": [10.0**k for k in range(-4, 3)]}
    return heads.choose(functools.partial(heads.gda, *few), grid, *validation).head


def _tip_adapter(few, validation):
    grid = {"alpha": ALPHAS, "beta": BETAS}
    return heads.choose(functools.partial(heads.tip_adapter, *few), grid, *validation).head


def _tip_adapter_f(few, validation):
    trained = heads.tip_adapter_f(*few, alpha=1.0, beta=5.5)  # of the authors' code, before their search
    return heads.choose(trained._replace, {"alpha": ALPHAS, "beta": BETAS}, *validation).head


def _tip_x(few, validation):
    tip = _tip_adapter(few, validation)
    build = functools.partial(heads.tip_x, *few, alpha=tip.alpha, beta=tip.beta, reference=validation[0])
    return heads.choose(build, {"gamma": ALPHAS}, *validation).head


def _cross_modal_probe(few, validation):
    build = functools.partial(heads.cross_modal_probe, *few)
    return heads.choose(build, {"learning_rate": [1e-3, 1e-4]}, *validation).head


METHODS = {
    "zero_shot": _zero_shot,
    "linear_probe": _linear_probe,
    "gda": _gda,
    "tip_adapter": _tip_adapter,
    "tip_adapter_f": _tip_adapter_f,
    "tip_x": _tip_x,
    "cross_modal_probe": _cross_modal_probe,
}


def few_shot(
    *,
    uri: str,
    split: str | None = None,
    train_split: str | None = "train",
    label: str,
    classes: str | Sequence[str] | Mapping[int, str] | None = None,
    templates: str | Sequence[str] = "{}",
    methods: Sequence[str] = tuple(METHODS),
    shots: int = 16,
    seeds: int = 3,
    where: Mapping[str, Sequence] | None = None,
    train_where: Mapping[str, Sequence] | None = None,
    ops: str | None = None,
    batch_size: int = 256,
    memory_share: float = 0.25,
) -> Callable[..., Result]:
    """Returns an evaluator `(pretrained, mesh=None, progress=None) -> Result`.

    Of each class `shots` training pictures are drawn, and up to 4 others, as many as shots at most, on which
    hyper-parameters are chosen (the protocol of CoOp, arXiv:2109.01134, section 4.1, and of Tip-Adapter's successors);
    nothing is chosen on `split`. Pictures are embedded once. Metrics: `METHOD/top1`, the mean over seeds, and
    `METHOD/spread`, their standard deviation; `examples`, `left_out` (of another label).

    Args:
      uri, split, train_split, label, where, train_where, ops, batch_size, memory_share: as for `probe`.
      classes: the labels that count, with their names, see `classes.read`; None: as the data set says.
      templates: prompts, see `classes.read_templates`.
      methods: keys of `METHODS`.
      shots: training pictures of each class; of a class with fewer, all but those to choose on.
      seeds: how many draws: 0, 1, ...
    """
    fits = {method: choose(METHODS, method, "a method of few_shot") for method in methods}
    if shots < 1 or seeds < 1:
        raise UserError(f"few_shot wants shots and seeds of 1 or more; got {shots} and {seeds}")
    given = None if classes is None else class_names.read(classes)
    prompts = class_names.read_templates(templates)
    limit = memory_limit(memory_share)

    def evaluate(pretrained: Any, mesh: Any = None, progress: Progress | None = None) -> Result:
        del mesh  # the model knows where it runs
        if pretrained.is_captioner:
            raise UserError("few_shot compares embeddings, which a captioner has none of; see `probe`")
        progress = progress or Progress()
        string = f'decode | boxed("{label}", to="label") | {ops or pretrained.preprocess} | keep("image", "label")'
        data = dict(uri=uri, ops=string, batch_size=batch_size)
        _, _, train = open_pass(pretrained, split=train_split, where=train_where, **data)
        pretrained, hosts, batches = open_pass(pretrained, split=split, where=where, **data)
        source = open_source(uri, train_split)
        named = given or class_names.of_source(source, label, f"{uri} {train_split or ''}")
        index_of = class_names.index_of(named)
        labels = index_of([row or [None] for row in read_fields(source, train.examples.chosen, [label])])
        draws = [few_shots(labels, shots + min(shots, 4), seed) for seed in range(seeds)]
        places = np.unique(np.concatenate(draws))
        train = only(train, places)
        text = class_embeddings(pretrained.embed_texts, list(named.values()), prompts)
        counts = progress.begin(
            examples=batches.num_examples, train_examples=train.num_examples, batch_size=hosts.batch_size
        )
        counts = {"train_batches": 0, "batches": 0} | hosts.from_first(counts)
        tables = progress.table("train", limit), progress.table("examples", limit)
        for name, part, table in zip(("train_batches", "batches"), (train, batches), tables, strict=True):
            for batch in stream(part, hosts, ["label"], counts[name], progress.show):
                x = pretrained.embed_image_batch(batch.image)
                if hosts.first:
                    truth = index_of(batch.columns["label"])
                    table.append(feature=x[batch.mask], label=truth[batch.mask], position=batch.position[batch.mask])
                progress.save(**{name: batch.done})
        numbers = {}
        if hosts.first:
            scale = math.exp(float(pretrained.params["logit_scale"]))
            numbers = _accuracies(fits, *tables, places, draws, shots, text, scale)
        return Result(hosts.from_first(numbers), {})

    return evaluate


def _accuracies(fits, train, test, places, draws, shots, text, scale) -> dict[str, float]:
    known, queries = ({key: table.read(key) for key in ("feature", "label", "position")} for table in (train, test))
    among = queries["label"] >= 0
    if not among.any():
        raise UserError(f"few_shot: no picture to be named is of the {len(text)} classes")
    numbers = {"examples": float(among.sum()), "left_out": float(len(among) - among.sum())}
    found = {method: [] for method in fits}
    for seed, draw in enumerate(draws):
        row = np.flatnonzero(np.isin(places[known["position"]], draw))  # a picture that could not be read has none
        features, labels = known["feature"][row], known["label"][row]
        training = np.isin(np.arange(len(row)), _training_places(labels, shots, seed))
        if training.all() or not training.any():
            raise UserError("few_shot: too few pictures of a class to choose hyper-parameters on; fewer shots?")
        few = features[training], labels[training], text, scale
        for method, fit in fits.items():
            head = fit(few, (features[~training], labels[~training]))
            right = np.argmax(head(queries["feature"][among]), axis=1) == queries["label"][among]
            found[method].append(float(np.mean(right)))
    for method, values in found.items():
        numbers[f"{method}/top1"] = float(np.mean(values))
        numbers[f"{method}/spread"] = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return numbers


def _training_places(labels, shots, seed):
    """Places of up to `shots` examples of each class; of a class with no more, one is left out if it can be."""
    chosen = []
    for c in np.unique(labels):
        own = np.flatnonzero(labels == c)
        count = max(min(shots, len(own) - 1), 1)
        chosen.append(np.random.default_rng((seed, int(c), 1)).permutation(own)[:count])
    return np.concatenate(chosen)
