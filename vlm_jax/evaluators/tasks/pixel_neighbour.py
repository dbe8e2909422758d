"""A baseline: a picture gets the name of the training picture that is nearest in pixels."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.catalogue import method
from vlm_jax.evaluators import classes as class_names
from vlm_jax.evaluators import metrics
from vlm_jax.evaluators.labels import Classes, fewer
from vlm_jax.evaluators.one_pass import Batch, Columns, Pass, picture_ops
from vlm_jax.evaluators.progress import Progress, Table
from vlm_jax.evaluators.result import Result


def standardise(pictures: np.ndarray) -> np.ndarray:
    """Subtracts each picture's mean and scales the picture to unit norm, float64 [N, F].

    Distances are then correlations, independent of brightness and contrast. An even picture becomes zero.
    """
    pictures = pictures - pictures.mean(axis=1, keepdims=True, dtype=np.float64)
    return pictures / np.maximum(np.linalg.norm(pictures, axis=1, keepdims=True), 1e-6)


def nearest_by_class(
    queries: np.ndarray, pictures: np.ndarray, labels: np.ndarray, num_classes: int, rows: int = 256
) -> np.ndarray:
    """Returns minus the squared distance to each class's nearest picture, float64 [N, C].

    The columns of classes without a picture are NaN.

    Args:
      queries: float [N, F].
      pictures: float [M, F].
      labels: int [M], the pictures' classes.
      num_classes: C.
      rows: queries at a time, which bounds the memory.
    """
    order = np.argsort(labels, kind="stable")
    present, first = np.unique(labels[order], return_index=True)
    pictures = pictures[order].astype(np.float64)
    scores = np.full((len(queries), num_classes), np.nan)
    for start in range(0, len(queries), rows):
        some = queries[start : start + rows].astype(np.float64)
        square = (some**2).sum(1)[:, None] - 2 * some @ pictures.T + (pictures**2).sum(1)
        scores[start : start + rows, present] = -np.minimum.reduceat(square, first, axis=1)
    return scores


@method(
    family="evaluators",
    differs="the nearest training picture in pixels, the baseline that a model must beat",
)
def pixel_neighbour(
    *,
    uri: str,
    split: str | None = None,
    train_split: str | None = "train",
    classes: str | Sequence[str] | Mapping[int, str],
    label: str = "concept",
    where: Mapping[str, Sequence] | None = None,
    train_where: Mapping[str, Sequence] | None = None,
    size: int = 16,
    batch_size: int = 256,
) -> Callable[..., Result]:
    """Returns an evaluator `(pretrained=None, progress=None) -> Result` that looks at pixels only.

    Pictures are cropped to the drawing's bounding box and resized to `size`. The five best names are the classes of the
    nearest training pictures, each class once. Metrics: `pixel_top1` and `pixel_top5`, by Euclidean distance;
    `pixel_standardised_top1` and `pixel_standardised_top5`, the same of standardised pictures; `pixel_examples`. Labels
    of both splits are found by name, see `labels.Classes`.

    Args:
      uri: the data set, as for `sources.open_source`.
      split: the split to name.
      train_split: the split to compare with.
      classes: the classes that count, see `classes.read`; other pictures are left out of both splits.
      label: the record's field with the label.
      where: field -> values that a picture to be named must have.
      train_where: the same for training pictures.
      size: side in pixels.
      batch_size: pictures read at a time.
    """
    named = Classes(class_names.read(classes))
    string = picture_ops(f"crop_to_content | resize({size}) | to_float", label)

    def evaluate(pretrained: Any = None, progress: Progress | None = None) -> Result:
        del pretrained  # the baseline is the same for all models
        progress, shared = progress or Progress(), dict(uri=uri, ops=string, batch_size=batch_size)
        data = Pass(None, progress, split=split, where=where, **shared)
        train = Pass(None, progress, split=train_split, where=train_where, name="train_", **shared)
        data.begin("examples")
        train.begin("train")
        for one, table in ((data, "examples"), (train, "train")):
            look, rows = one.look(named, label), lambda batch, table=table: {table: _pixels(batch)}
            one.check_any(one.run(rows, about=lambda fields, look=look: look(fields[0])), label, named, look)
        return data.result(lambda tables: _result(tables["examples"], train.tables["train"], named))

    return evaluate


def _pixels(batch: Batch) -> Columns:
    return {"image": batch.inputs[batch.kept].reshape(len(batch.kept), -1), "label": np.array(batch.about)}


def _result(examples: Table, train: Table, classes: Classes) -> Result:
    queries, truth = examples.read("image"), examples.read("label")
    pictures, labels = train.read("image"), train.read("label")
    shares = {}
    for name, prepare in (("pixel", lambda x: x), ("pixel_standardised", standardise)):
        scores = nearest_by_class(prepare(queries), prepare(pictures), labels, len(classes))
        ranks = metrics.truth_ranks(scores, truth)
        shares |= {f"{name}_top1": ranks.within(1), f"{name}_top5": ranks.within(5)}
    numbers = {name: float(np.mean(share)) for name, share in shares.items()}
    notes = [*fewer(classes.names, labels, None), *classes.notes(truth)]
    return Result(numbers | {"pixel_examples": float(len(truth))}, {}, metrics.intervals(shares), notes)
