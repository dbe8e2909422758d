"""Probes: how far a linear classifier gets on features that stay as they are, from all pictures or a few a class."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.config import choose
from vlm_jax.data import loader
from vlm_jax.data.sources import open_source
from vlm_jax.errors import UserError
from vlm_jax.evaluators import classes as class_names
from vlm_jax.evaluators import metrics
from vlm_jax.evaluators.ops import boxed  # noqa: F401 (registered as an op)
from vlm_jax.evaluators.progress import Progress, memory_limit
from vlm_jax.evaluators.records import read_fields
from vlm_jax.evaluators.result import Result
from vlm_jax.evaluators.stream import open_pass, stream
from vlm_jax.pretrained.linear import logistic_regression, ridge

SOLVERS = {"ridge": ridge, "lbfgs": logistic_regression}


def probe(
    *,
    uri: str,
    split: str | None = None,
    train_split: str | None = "train",
    label: str,
    classes: str | Sequence[str] | Mapping[int, str] | None = None,
    shots: int | None = None,
    solver: str = "ridge",
    l2: float = 1.0,
    seed: int = 0,
    where: Mapping[str, Sequence] | None = None,
    train_where: Mapping[str, Sequence] | None = None,
    ops: str | None = None,
    batch_size: int = 256,
    memory_share: float = 0.25,
) -> Callable[..., Result]:
    """Returns an evaluator `(pretrained, mesh=None, progress=None) -> Result`.

    The features are `Pretrained.image_feature_batch`'s, the mean of the image tower's tokens, each of them shifted and
    scaled to mean 0 and variance 1 over the training pictures. Metrics: `top1`, `top5` (left out below six classes),
    `mean_per_class`, `examples`, `left_out` (of another label), `train_examples`.

    Args:
      uri: the data set, as for `sources.open_source`.
      split: the split to name.
      train_split: the split to learn from.
      label: the record's field with the label.
      classes: the labels that count, see `classes.read`; by default those of the training pictures.
      shots: how many training pictures of each class are drawn (all, of a class with fewer); None takes all.
      solver: "ridge" (least squares, closed form: for few shots) or "lbfgs" (logistic regression), see `linear`.
      l2: weight of the squared weights in the sum over examples.
      seed: of the draw.
      where: field -> values that a picture to be named must have.
      train_where: the same for training pictures.
      ops: op string from record to `image`; the model's own preprocessing by default.
      batch_size: pictures at a time; the numbers do not depend on it.
      memory_share: of the free memory, for features; beyond it, a file.
    """
    solve = choose(SOLVERS, solver, "the solver of a probe")
    if shots is not None and shots < 1:
        raise UserError(f"shots is {shots}; expected a number of training pictures of each class, or None for all")
    given = None if classes is None else class_names.read(classes)
    limit = memory_limit(memory_share)

    def evaluate(pretrained: Any, mesh: Any = None, progress: Progress | None = None) -> Result:
        del mesh  # the model knows where it runs
        progress = progress or Progress()
        string = f'decode | boxed("{label}", to="label") | {ops or pretrained.preprocess} | keep("image", "label")'
        data = dict(uri=uri, ops=string, batch_size=batch_size)
        _, _, train = open_pass(pretrained, split=train_split, where=train_where, **data)
        pretrained, hosts, batches = open_pass(pretrained, split=split, where=where, **data)
        rows = read_fields(open_source(uri, train_split), train.examples.chosen, [label])
        named = given or {name: str(name) for name in sorted({row[0] for row in rows if row})}
        index_of = class_names.index_of(named)
        labels = index_of([row or [None] for row in rows])
        if not (labels >= 0).any():
            raise UserError(f"{uri} {train_split or ''}: no training picture's `{label}` is among the classes")
        train = only(train, few_shots(labels, shots, seed))
        counts = progress.begin(
            examples=batches.num_examples, train_examples=train.num_examples, batch_size=hosts.batch_size
        )
        counts = {"train_batches": 0, "batches": 0, "left_out": 0} | hosts.from_first(counts)
        known, found = progress.table("train", limit), progress.table("examples", limit)

        def features(batches, done):
            for batch in stream(batches, hosts, ["label"], done, progress.show):
                yield batch, index_of(batch.columns["label"]), pretrained.image_feature_batch(batch.image)

        for batch, truth, x in features(train, counts["train_batches"]):
            if hosts.first:
                known.append(feature=x[batch.mask], label=truth[batch.mask])
            progress.save(train_batches=batch.done)
        classify = _fitted(known, len(named), solve, l2) if hosts.first else None
        left_out = counts["left_out"]
        for batch, truth, x in features(batches, counts["batches"]):
            among = batch.mask & (truth >= 0)
            left_out += int(batch.mask.sum() - among.sum())
            if hosts.first:
                scores = classify(x[among])
                found.append(
                    position=batch.position[among],
                    truth=truth[among],
                    rank=metrics.truth_ranks(scores, truth[among]),
                    predicted=scores.argmax(1),
                )
            progress.save(batches=batch.done, left_out=left_out)
        result = _result(found, len(known), named) if hosts.first else Result({}, {})
        numbers = hosts.from_first(result.metrics | {"left_out": float(left_out)})
        if not numbers["examples"]:
            raise UserError(f"{uri} {split or ''}: no picture's `{label}` is among the {len(named)} classes")
        return result._replace(metrics=numbers)

    return evaluate


def few_shots(labels: np.ndarray, shots: int | None, seed: int) -> np.ndarray:
    """The places of `shots` examples of each class (of all, where there are fewer), in order, drawn by the seed.

    Args:
      labels: int [N]; negative ones are no class.
      shots: how many; None for all.
      seed: the draw of a class depends on it, the class, and how many it has.
    """
    chosen = []
    for c in np.unique(labels[labels >= 0]):
        own = np.flatnonzero(labels == c)
        chosen.append(own if shots is None else np.random.default_rng((seed, int(c))).permutation(own)[:shots])
    return np.sort(np.concatenate(chosen))


def only(batches: loader.EvalBatches, places: np.ndarray) -> loader.EvalBatches:
    """The same batches of some of the examples."""
    some = copy.copy(batches)
    some.examples, some.num_examples = copy.copy(batches.examples), len(places)
    some.examples.chosen = places if batches.examples.chosen is None else batches.examples.chosen[places]
    return some


def _fitted(known: Any, classes: int, solve: Callable, l2: float) -> Callable[[np.ndarray], np.ndarray]:
    """Features [B, D] -> scores [B, C]."""
    x = known.read("feature").astype(np.float64)
    mean, scale = x.mean(0), np.maximum(x.std(0), 1e-6)
    fitted = solve((x - mean) / scale, known.read("label"), classes, l2)
    return lambda features: fitted((features - mean) / scale)


def _result(found: Any, train_examples: int, named: Mapping) -> Result:
    truth, rank = found.read("truth"), found.read("rank")
    numbers = {"examples": float(len(truth)), "train_examples": float(train_examples)}
    if not len(truth):
        return Result(numbers, {})
    mean, per_class = metrics.mean_per_class_accuracy(rank == 0, truth, len(named))
    top = {"top1": float(np.mean(rank == 0))} | ({"top5": float(np.mean(rank < 5))} if len(named) > 5 else {})
    predictions = {
        "position": found.read("position"), "label": truth, "predicted": found.read("predicted"), "rank_of_label": rank
    }  # fmt: skip
    artifacts = {"classes": list(named.values()), "per_class": per_class, "predictions": predictions}
    return Result(top | {"mean_per_class": mean} | numbers, artifacts)
