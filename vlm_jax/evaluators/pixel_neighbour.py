"""Naming a picture after the training picture that is nearest in pixels: what a model must beat."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.data import loader
from vlm_jax.errors import UserError
from vlm_jax.evaluators import classes as class_names
from vlm_jax.evaluators import metrics
from vlm_jax.evaluators.ops import boxed  # noqa: F401 (registered as an op)
from vlm_jax.evaluators.result import Result


def standardise(pictures: np.ndarray) -> np.ndarray:
    """Takes each picture's mean away and scales it to unit norm, float64 [N, F]; an even picture becomes zero.

    Distances are then correlations, which brightness and contrast do not touch.
    """
    pictures = pictures - pictures.mean(axis=1, keepdims=True, dtype=np.float64)
    return pictures / np.maximum(np.linalg.norm(pictures, axis=1, keepdims=True), 1e-6)


def nearest_by_class(
    queries: np.ndarray, pictures: np.ndarray, labels: np.ndarray, num_classes: int, rows: int = 256
) -> np.ndarray:
    """Returns minus the squared distance to each class's nearest picture, float64 [N, C]; NaN for a class without one.

    Args:
      queries: float [N, F].
      pictures: float [M, F].
      labels: int [M], the pictures' classes.
      num_classes: C.
      rows: queries at a time; bounds the memory.
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
    """Returns an evaluator `(pretrained=None, mesh=None) -> Result` that looks at pixels only.

    Pictures are cropped to the drawing's bounding box and resized to `size`; the five best names are the classes of the
    nearest training pictures, each class once. Metrics: `pixel_top1` and `pixel_top5`, of Euclidean distances;
    `pixel_standardised_top1` and `pixel_standardised_top5`, of pictures standardised first; `pixel_examples`.

    Args:
      uri: the data set, as for `sources.open_source`.
      split: the split to name.
      train_split: the split to compare with.
      classes: the classes that count, see `classes.read`; all other pictures are left out on both sides.
      label: the record's field with the label.
      where: field -> values that a picture to be named must have.
      train_where: the same for training pictures.
      size: side in pixels.
      batch_size: pictures read at a time.
    """
    named = class_names.read(classes)
    index_of = class_names.index_of(named)

    def read(split, where):
        pixels = f"decode | crop_to_content | resize({size}) | to_float"
        ops = f'{pixels} | boxed("{label}", to="label") | keep("image", "label")'
        images, labels = [], []
        for batch in loader.eval_batches(uri=uri, split=split, ops=ops, where=where, batch_size=batch_size):
            index = index_of(batch["label"])
            among = batch["mask"] & (index >= 0)
            images.append(batch["image"].reshape(len(among), -1)[among])
            labels.append(index[among])
        if not sum(map(len, labels)):
            raise UserError(f"{uri} {split or ''}: no picture's `{label}` is among the classes {classes!r:.60}")
        return np.concatenate(images), np.concatenate(labels)

    def evaluate(pretrained: Any = None, mesh: Any = None) -> Result:
        del pretrained, mesh
        queries, truth = read(split, where)
        pictures, labels = read(train_split, train_where)
        numbers = {}
        for name, prepare in (("pixel", lambda x: x), ("pixel_standardised", standardise)):
            scores = nearest_by_class(prepare(queries), prepare(pictures), labels, len(named))
            ranks = metrics.truth_ranks(scores, truth)
            numbers |= {f"{name}_top1": float(np.mean(ranks < 1)), f"{name}_top5": float(np.mean(ranks < 5))}
        numbers["pixel_examples"] = float(len(truth))
        return Result(numbers, {})

    return evaluate
