"""Few shots: ways to adapt a two-tower model to some pictures of each class, over several draws of them.

Protocols: other pictures of the same classes (CoOp), of classes that were not trained on (base to new: CoCoOp), of
other data sets (cross data set) and of other styles (domain generalisation).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from vlm_jax import config
from vlm_jax.adapt.methods import HEADS, METHODS, TUNED, Shots, Task, accuracy, share_right
from vlm_jax.data.sources import open_source
from vlm_jax.errors import UserError
from vlm_jax.evaluators import classes as class_names
from vlm_jax.evaluators.ops import boxed  # noqa: F401 (registered as an op)
from vlm_jax.evaluators.probe import few_shots, only
from vlm_jax.evaluators.progress import Progress, memory_limit
from vlm_jax.evaluators.records import read_fields
from vlm_jax.evaluators.result import Result
from vlm_jax.evaluators.stream import open_pass, stream
from vlm_jax.pretrained import Pretrained, class_embeddings


class Test(NamedTuple):
    """Pictures to be named, and the names to choose among.

    Attributes:
      uri, split, where: the data set.
      label: the field with the label.
      named: label -> name.
    """

    uri: str
    split: str | None
    where: Mapping[str, Sequence] | None
    label: str
    named: Mapping[int | str, str]


def few_shot(
    *,
    uri: str,
    split: str | None = None,
    train_split: str | None = "train",
    label: str | None = None,
    classes: str | Sequence[str] | Mapping[int, str] | None = None,
    templates: str | Sequence[str] = "{}",
    methods: Sequence[str] = tuple(HEADS),
    options: Mapping[str, Any] | None = None,
    shots: int = 16,
    seeds: int = 3,
    where: Mapping[str, Sequence] | None = None,
    train_where: Mapping[str, Sequence] | None = None,
    tests: Mapping[str, Mapping[str, Any]] | None = None,
    base_to_new: bool = False,
    ops: str | None = None,
    batch_size: int = 256,
    memory_share: float = 0.25,
    keep: Callable[[str, int, Pretrained], None] | None = None,
) -> Callable[..., Result]:
    """Returns an evaluator `(pretrained, mesh=None, progress=None) -> Result`.

    Of each class `shots` training pictures are drawn, and up to 4 others, as many as shots at most, on which
    hyper-parameters are chosen (the protocol of CoOp, arXiv:2109.01134, section 4.1, and of Tip-Adapter's successors);
    nothing is chosen on `split`. Metrics: `METHOD/top1`, the mean over seeds, and `METHOD/spread`, their standard
    deviation; `METHOD/TEST/top1` and `METHOD/TEST/spread` of further tests; with `base_to_new`,
    `METHOD/new/...` and `METHOD/harmonic_mean`; `examples`, `left_out` (of another label, or unreadable).

    Args:
      uri, split, train_split, label, where, train_where, ops, batch_size, memory_share: as for `probe`.
      classes: the labels that count, with their names, see `classes.read`; None: as the data set says.
      templates: prompts, see `classes.read_templates`.
      methods: keys of `adapt.methods.METHODS`.
      options: of the methods, which are then all of `adapt.methods.TUNED`: steps, learning_rate, rank, ...
      shots: training pictures of each class; of a class with fewer, all but those to choose on.
      seeds: how many draws: 0, 1, ...
      tests: name -> what differs from `uri`, `split`, `where`, `label` and `classes` in a further test. Heads are only
        tested on the classes that they were trained on.
      base_to_new: trains on the first half of the classes and tests the others as `new`, too (arXiv:2203.05557,
        section 4.1), each half among its own names.
      keep: is called with method, seed and adapted model.
    """
    fits = {method: config.choose(METHODS, method, "a method of few_shot") for method in methods}
    if options and (fixed := [method for method in methods if method not in TUNED]):
        raise UserError(f"few_shot: {', '.join(options)} given to {fixed[0]}, which takes no options")
    if shots < 1 or seeds < 1:
        raise UserError(f"few_shot wants shots and seeds of 1 or more; got {shots} and {seeds}")
    if label is None:
        label = class_names.find_label(open_source(uri, train_split), f"data set `{uri}`")
    named = _named(classes, uri, train_split, label)
    prompts = class_names.read_templates(templates)
    main = Test(uri, split, where, label, named)
    all_tests = {"": main} | {
        name: _further(main, changes, name, given=classes is not None) for name, changes in (tests or {}).items()
    }
    if base_to_new:
        if "new" in all_tests:
            raise UserError("few_shot: base_to_new has a test `new` of its own; give yours another name")
        named, new = _halves(named)
        all_tests |= {"": main._replace(named=named), "new": main._replace(named=new)}
    for name, test in all_tests.items():
        if (test.uri, test.split, test.where) == (uri, train_split, train_where):
            raise UserError(
                f"few_shot: test `{name or 'split'}` would name the pictures that are trained on; "
                "give another split, or where and train_where"
            )
    pictures = any(method not in HEADS for method in methods)
    limit = memory_limit(memory_share)

    def evaluate(pretrained: Any, mesh: Any = None, progress: Progress | None = None) -> Result:
        del mesh  # the model knows where it runs
        if pretrained.is_captioner:
            raise UserError("few_shot compares embeddings, which a captioner has none of; see `probe`")
        if getattr(getattr(pretrained.model, "image", None), "pool", None) == "all":
            raise UserError(
                'few_shot compares one vector for each picture; this one has pool "all", one for each token'
            )
        if pictures and jax.process_count() > 1:
            raise UserError("few_shot tunes on one host; on several there are the heads: " + ", ".join(HEADS))
        progress = progress or Progress()

        def open_test(test: Test):
            prepare = ops or pretrained.preprocess
            string = f'decode | boxed("{test.label}", to="label") | {prepare} | keep("image", "label")'
            return open_pass(
                pretrained, uri=test.uri, split=test.split, where=test.where, ops=string, batch_size=batch_size
            )

        _, _, train = open_test(main._replace(split=train_split, where=train_where))
        index_of = class_names.index_of(named)
        rows = read_fields(open_source(uri, train_split), train.examples.chosen, [label])
        labels = index_of([row or [None] for row in rows])
        draws = [few_shots(labels, shots + min(shots, 4), seed) for seed in range(seeds)]
        places = np.unique(np.concatenate(draws))
        passes = {"train": (only(train, places), index_of)}
        for name, test in all_tests.items():
            placed, hosts, batches = open_test(test)
            passes[f"test_{name}"] = batches, class_names.index_of(test.named)
        counts = progress.begin(batch_size=hosts.batch_size, **{k: b.num_examples for k, (b, _) in passes.items()})
        counts = dict.fromkeys(passes, 0) | hosts.from_first(counts)
        found = {}
        for name, (batches, index) in passes.items():
            table = progress.table(name, limit / len(passes))
            for batch in stream(batches, hosts, ["label"], counts[name], progress.show):
                x = placed.embed_image_batch(batch.image)
                if hosts.first:
                    truth = index(batch.columns["label"])
                    among = batch.mask & (truth >= 0)
                    own = {"image": np.asarray(batch.image)[among]} if pictures else {}
                    table.append(feature=x[among], label=truth[among], position=batch.position[among], **own)
                progress.save(**{name: batch.done})
            found[name] = table
        texts = {
            name: class_embeddings(pretrained.embed_texts, list(test.named.values()), prompts)
            for name, test in all_tests.items()
        }
        numbers = {}
        if hosts.first:
            known = {key: found["train"].read(key) for key in ("feature", "label", "position")}
            images = found["train"].read("image") if pictures else None
            queries = {name: _queries(found[f"test_{name}"], name, pictures) for name in all_tests}
            numbers["examples"] = float(len(queries[""].labels))
            numbers["left_out"] = float(passes["test_"][0].num_examples - len(queries[""].labels))
            shares = {}
            for seed, draw in enumerate(draws):
                row = np.flatnonzero(np.isin(places[known["position"]], draw))  # of those that could be read
                few, validation = _parts(images, known, row, shots, seed)
                scale = math.exp(float(pretrained.params["logit_scale"]))
                task = Task(list(named.values()), prompts, texts[""], scale, seed)
                for method, fit in fits.items():
                    adapted = fit(pretrained, few, validation, task, **(options or {}))
                    if keep is not None:
                        keep(method, seed, adapted)
                    for name, test in all_tests.items():
                        names = list(test.named.values())
                        if method == "zero_shot":  # embedded by all hosts, above
                            share = share_right(queries[name].features @ texts[name].T, queries[name])
                        elif adapted.head is None or list(test.named.items()) == list(named.items()):
                            share = accuracy(pretrained, adapted, queries[name], names)
                        else:
                            continue
                        shares.setdefault((method, name), []).append(share)
            numbers |= _summary(shares)
        return Result(hosts.from_first(numbers), {})

    return evaluate


def _named(classes, uri, split, label) -> dict[int | str, str]:
    if classes is not None:
        return class_names.read(classes)
    return class_names.of_source(open_source(uri, split), label, f"{uri} {split or ''}")


def _further(main: Test, changes: Mapping[str, Any], name: str, given: bool) -> Test:
    """A further test; `given`: whether the classes of the main one were, else a data set says its own."""
    changes = dict(changes)
    classes = changes.pop("classes", None)
    test = config.call(Test, main._asdict() | changes, f"the test `{name}` of few_shot")
    if classes is not None:
        return test._replace(named=class_names.read(classes))
    if not given and {"uri", "label"} & changes.keys():
        return test._replace(named=_named(None, test.uri, test.split, test.label))
    return test


def _halves(named: Mapping) -> tuple[dict, dict]:
    """The first half of the classes, the larger one, and the other (CoOp's code, for base to new)."""
    pairs = list(named.items())
    if len(pairs) < 2:
        raise UserError(f"base_to_new halves the classes, of which there is {len(pairs)}")
    middle = -(-len(pairs) // 2)
    return dict(pairs[:middle]), dict(pairs[middle:])


def _queries(table: Any, name: str, pictures: bool) -> Shots:
    if not len(table):
        raise UserError(f"few_shot: no picture to be named is of the classes of test `{name or 'split'}`")
    return Shots(table.read("image") if pictures else None, table.read("feature"), table.read("label"))


def _parts(images: Any, known: Mapping[str, np.ndarray], row: np.ndarray, shots: int, seed: int) -> tuple[Shots, Shots]:
    """The pictures of a draw to train on, and those to choose on."""
    features, labels = known["feature"][row], known["label"][row]
    training = np.isin(np.arange(len(row)), _training_places(labels, shots, seed))
    if training.all() or not training.any():
        raise UserError("few_shot: too few pictures of a class to choose hyper-parameters on; fewer shots?")
    part = lambda mask: Shots(None if images is None else images[row[mask]], features[mask], labels[mask])
    return part(training), part(~training)


def _summary(shares: Mapping[tuple[str, str], Sequence[float]]) -> dict[str, float]:
    """Means and standard deviations over seeds."""
    numbers = {}
    spread = lambda values: float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    for (method, test), values in shares.items():
        where = f"{method}/{test}/" if test else f"{method}/"
        numbers |= {f"{where}top1": float(np.mean(values)), f"{where}spread": spread(values)}
        if test == "new":
            base = shares[method, ""]
            means = [2 * b * n / (b + n) if b + n else 0.0 for b, n in zip(base, values, strict=True)]
            numbers |= {f"{method}/harmonic_mean": float(np.mean(means)), f"{method}/harmonic_spread": spread(means)}
    return numbers


def _training_places(labels, shots, seed):
    """Places of up to `shots` examples of each class; of a class with no more, one is left out if it can be."""
    chosen = []
    for c in np.unique(labels):
        own = np.flatnonzero(labels == c)
        count = max(min(shots, len(own) - 1), 1)
        chosen.append(np.random.default_rng((seed, int(c), 1)).permutation(own)[:count])
    return np.concatenate(chosen)
