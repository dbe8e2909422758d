"""Probes: the accuracy of a linear or nearest-neighbour classifier on frozen features, from all or a few pictures."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.catalogue import method
from vlm_jax.config import choose
from vlm_jax.data.sources import train_split_of
from vlm_jax.errors import UserError
from vlm_jax.evaluators import classes as class_names
from vlm_jax.evaluators import metrics
from vlm_jax.evaluators.labels import Classes, fewer, indices, some
from vlm_jax.evaluators.one_pass import Batch, Columns, Pass, picture_ops
from vlm_jax.evaluators.progress import Progress, Table, memory_limit
from vlm_jax.evaluators.result import Result
from vlm_jax.evaluators.sampling import few_shots
from vlm_jax.evaluators.tasks.zeroshot import named_right, ties
from vlm_jax.pretrained.linear import logistic_regression, ridge
from vlm_jax.pretrained.neighbours import knn

SOLVERS = {"ridge": ridge, "lbfgs": logistic_regression, "knn": knn}


@method(
    family="evaluators",
    paper="arXiv:2103.00020",
    where="section 3.2",
    differs="a linear or kNN classifier on the image tower's features, of all or a few pictures",
)
def probe(
    *,
    uri: str,
    split: str | None = None,
    train_uri: str | None = None,
    train_split: str | None = "train",
    label: str,
    classes: str | Sequence[str] | Mapping[int, str] | None = None,
    shots: int | None = None,
    layer: int | None = None,
    solver: str = "ridge",
    l2: float = 1.0,
    neighbours: int = 20,
    seed: int = 0,
    where: Mapping[str, Sequence] | None = None,
    train_where: Mapping[str, Sequence] | None = None,
    ops: str | None = None,
    batch_size: int = 256,
    memory_share: float = 0.25,
) -> Callable[..., Result]:
    """Returns an evaluator `(pretrained, progress=None) -> Result`.

    The features are those of `Pretrained.image_feature_batch`, the mean of the image tower's tokens or of a block's.
    Each feature is shifted and scaled to mean 0 and variance 1 over the training pictures, but for "knn". Metrics:
    `top1`, `top5` (left out below six classes), `mean_per_class`, `examples`, `left_out` (pictures of another label),
    `train_examples`, `ties`.

    Args:
      uri: the data set, as for `sources.open_source`.
      split: the split to name.
      train_uri: the data set to learn from; defaults to `uri`.
      train_split: the split to learn from; a data set without splits has none.
      label: the record's field with the label.
      classes: the labels that count, see `classes.read`; defaults to the labels of the training pictures. Labels of
        both splits are found by name, see `labels.Classes`.
      shots: training pictures drawn of each class; a smaller class gives all its pictures; None takes all.
      layer: number of a block of the image tower, from 0; negative ones count from the end. None: the tower's output.
      solver: "ridge" (least squares, closed form: for few shots) or "lbfgs" (logistic regression), see `linear`; or
        "knn", a weighted vote of the nearest training pictures, see `pretrained.neighbours`.
      l2: weight of the squared weights in the sum over examples.
      neighbours: number of nearest training pictures that vote, for "knn".
      seed: seed of the draw.
      where: field -> values; other pictures are not named.
      train_where: the same for training pictures.
      ops: op string from record to `image`; defaults to the model's preprocessing.
      batch_size: pictures at a time; the metrics do not depend on the batch size.
      memory_share: share of the free memory for the features; more features go to a file.
    """
    solve = choose(SOLVERS, solver, "the solver of a probe")
    if neighbours < 1:
        raise UserError(f"neighbours is {neighbours}; expected 1 or more")
    chosen = {} if layer is None else {"layer": layer}
    if shots is not None and shots < 1:
        raise UserError(f"shots is {shots}; expected a number of training pictures of each class, or None for all")
    given = None if classes is None else class_names.read(classes)
    limit = memory_limit(memory_share)

    def evaluate(pretrained: Any, progress: Progress | None = None) -> Result:
        progress = progress or Progress()
        shared = dict(ops=picture_ops(ops or pretrained.preprocess, label), batch_size=batch_size, memory=limit)
        learn = dict(uri=train_uri or uri, split=train_split_of(train_uri or uri, train_split), where=train_where)
        train = Pass(pretrained, progress, name="train_", **learn, **shared)
        data = Pass(pretrained, progress, uri=uri, split=split, where=where, **shared)
        pretrained = data.pretrained
        records = train.fields(label)
        named = Classes(given or _of_records(records, train.source.label_names(label)))
        look_in_train, look = (one.look(named, label) for one in (train, data))
        labels = indices(records, look_in_train)
        if not (labels >= 0).any():
            raise UserError(f"{train.about}: no training picture's `{label}` is among the classes {some(named.names)}")
        train.only(few_shots(labels, shots, seed))
        train.begin("train")
        data.begin("examples")

        def features(batch: Batch) -> np.ndarray:
            return pretrained.image_feature_batch(batch.inputs, **chosen)[batch.kept]

        def train_rows(batch: Batch) -> Mapping[str, Columns]:
            return {"train": {"feature": features(batch), "label": np.array(batch.about)}}

        def rows(batch: Batch) -> Mapping[str, Columns]:
            x, truth = features(batch), np.array(batch.about)
            if not data.first:  # only the first host has the classifier
                return {}
            scores = classify(x)
            ranks = metrics.truth_ranks(scores, truth)._asdict()
            return {"examples": {"position": batch.position, "truth": truth, "predicted": scores.argmax(1), **ranks}}

        def finish(tables: Mapping[str, Table]) -> Result:
            notes = fewer(named.names, labels, shots)
            left_out = lambda: data.left_out(label, look)
            return _result(tables["examples"], len(train.tables["train"]), named, notes, left_out)

        train.run(train_rows, about=lambda fields: look_in_train(fields[0]))
        weight = neighbours if solver == "knn" else l2
        classify = _fitted(train.tables["train"], len(named), solve, weight) if train.first else None
        data.check_any(data.run(rows, about=lambda fields: look(fields[0])), label, named, look)
        return data.result(finish, "left_out")

    return evaluate


def _fitted(known: Table, classes: int, solve: Callable, weight: float) -> Callable[[np.ndarray], np.ndarray]:
    """Features [B, D] -> scores [B, C]."""
    x = known.read("feature").astype(np.float64)
    if solve is knn:
        return knn(x, known.read("label"), classes, weight)
    mean, scale = x.mean(0), np.maximum(x.std(0), 1e-6)
    fitted = solve((x - mean) / scale, known.read("label"), classes, weight)
    return lambda features: fitted((features - mean) / scale)


def _of_records(records: Sequence, own: Mapping[int, str] | None) -> dict[int | str, str]:
    """Label -> name of the labels that records have, in order; own: the data set's own list."""
    values = {record[0] for record in records if record and isinstance(record[0], int | float | str)} - {""}
    names = own or {}
    return {value: names.get(value, str(value)) for value in sorted(values, key=lambda v: (isinstance(v, str), v))}


def _result(
    found: Table, train_examples: int, classes: Classes, notes: Sequence[str], left_out: Callable[[], Counter]
) -> Result:  # fmt: skip
    truth = found.read("truth")
    ranks = metrics.Ranks(*map(found.read, metrics.Ranks._fields))
    numbers, per_class, intervals = named_right(ranks, truth, len(classes))
    predictions = {
        "position": found.read("position"), "label": truth, "predicted": found.read("predicted"),
        "rank_of_label": ranks.above, "ties_of_label": ranks.tied,
    }  # fmt: skip
    artifacts = {"classes": classes.names, "per_class": per_class, "predictions": predictions}
    artifacts["classes_without_picture"] = classes.without_picture(truth)
    notes = [*notes, *classes.notes(truth, left_out), *ties(ranks, "pictures")]
    return Result(numbers | {"train_examples": float(train_examples)}, artifacts, intervals, notes)
