"""Blind pairs: pictures that a model takes for nearly the same and another model tells apart."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.evaluators import classes as class_names
from vlm_jax.evaluators import metrics
from vlm_jax.evaluators.labels import Classes
from vlm_jax.evaluators.naming import namer
from vlm_jax.evaluators.one_pass import Batch, Columns, Pass, picture_ops
from vlm_jax.evaluators.progress import Progress, Table, memory_limit
from vlm_jax.evaluators.result import Result
from vlm_jax.pretrained import unit
from vlm_jax.zoo.load import load

ROWS = 1024  # pictures compared with all others at a time


@method(
    family="evaluators",
    system="MMVP",
    paper="arXiv:2401.06209",
    differs="pairs that are close for the model and far for another one, and whether the model names both right",
)
def blind_pairs(
    *,
    uri: str,
    other: str,
    split: str | None = None,
    classes: str | Sequence[str] | Mapping[int, str],
    label: str = "label",
    templates: str | Sequence[str] = ("{}",),
    close: float = 0.95,
    far: float = 0.6,
    where: Mapping[str, Sequence] | None = None,
    batch_size: int = 256,
    gallery: int = 12,
    memory_share: float = 0.25,
) -> Callable[..., Result]:
    """Returns an evaluator `(pretrained, progress=None) -> Result` of two towers.

    A pair is two pictures of different classes whose cosine is above `close` for the model and below `far` for the
    other model; no picture is in two pairs, the pairs of the largest difference come first. The other model's picture
    is the mean of its image tower's tokens: it needs no texts.

    Metrics: `pairs`; `both_right`, the share of pairs whose two pictures each fit their own class's name better than
    the name of the other (0.25 by chance); `neighbour`, `other/neighbour`, the share of pairs whose two pictures have
    a picture of their own class nearest among the split's other pictures of the two classes, by the model's embeddings
    and by the other model's. `examples`, `left_out`. Without a pair, the shares are left out, and a note says so.

    Args:
      uri: the data set, as for `sources.open_source`.
      other: the other model, as for `load`: a self-supervised tower, in the paper.
      split: its split.
      classes: the names, see `classes.read`.
      label: the record's field with the label.
      templates: prompts, `{}` stands for the name.
      close, far: thresholds of cosines; the paper's.
      where: field -> values; other records are left out.
      batch_size: pictures at a time; the metrics do not depend on the batch size.
      gallery: number of pairs to show.
      memory_share: share of the free memory for the embeddings.
    """
    if not far <= close:
        raise UserError(f"blind_pairs: close is {close} and far {far}; expected far <= close")
    named = Classes(class_names.read(classes))
    templates = class_names.read_templates(templates)
    limit = memory_limit(memory_share) / 2

    def evaluate(pretrained: Any, progress: Progress | None = None) -> Result:
        progress, second = progress or Progress(), load(other)
        shared = dict(uri=uri, split=split, where=where, batch_size=batch_size, memory=limit)
        mine, theirs = (
            Pass(model, progress, name=name, ops=picture_ops(model.preprocess, label), **shared)
            for model, name in ((pretrained, ""), (second, "other_"))
        )
        mine.begin("mine")
        theirs.begin("theirs")
        score, _ = namer(mine.pretrained, named.names, templates)
        embedded = mine.pretrained.embed_image_batch

        def rows(batch: Batch) -> Mapping[str, Columns]:
            about = {"label": np.array(batch.about), "position": batch.position}
            found = {"embedding": embedded(batch.inputs)[batch.kept], "score": score(batch.inputs)[batch.kept]}
            return {"mine": found | about}

        features = lambda batch: unit(theirs.pretrained.image_feature_batch(batch.inputs)[batch.kept])
        for data, made in ((mine, rows), (theirs, lambda batch: {"theirs": {"embedding": features(batch)}})):
            look = data.look(named, label)
            kept = data.run(made, about=lambda fields, look=look: look(fields[0]))
            data.check_any(kept, label, named, look)
        finish = lambda tables: _result(
            tables["mine"], theirs.tables["theirs"], named.names, close, far, mine.thumbnails, gallery
        )
        return mine.result(finish, "left_out")

    return evaluate


def mined(x: np.ndarray, y: np.ndarray, labels: np.ndarray, close: float, far: float) -> np.ndarray:
    """Returns disjoint pairs (i, j) of rows of different labels with x_i . x_j > close and y_i . y_j < far, int [P, 2].

    The largest difference of the two products comes first.

    Args:
      x: float [n, D], unit norm.
      y: float [n, E], unit norm.
      labels: int [n].
    """
    found = []
    for start in range(0, len(x), ROWS):
        rows = slice(start, start + ROWS)
        a, b = x[rows] @ x.T, y[rows] @ y.T
        later = np.arange(len(x)) > np.arange(start, start + len(a))[:, None]
        i, j = np.nonzero((a > close) & (b < far) & later & (labels[rows, None] != labels))
        found.append(np.stack([start + i, j, (b - a)[i, j]], axis=1))
    pairs = np.concatenate(found)
    taken, chosen = set(), []
    for i, j, _ in pairs[np.argsort(pairs[:, 2], kind="stable")]:
        if not taken & {i, j}:
            taken |= {i, j}
            chosen.append((int(i), int(j)))
    return np.array(chosen, np.int64).reshape(-1, 2)


def neighbours_right(x: np.ndarray, labels: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Returns whether both pictures of each pair have a picture of their own class nearest among the other pictures of
    the two classes, bool [P]; x is float [n, D], of unit norm."""
    right = np.ones(len(pairs), bool)
    for p, pair in enumerate(pairs):
        for i in pair:
            near = np.where(np.isin(labels, labels[pair]), x @ x[i], -np.inf)
            near[i] = -np.inf
            right[p] &= labels[near.argmax()] == labels[i]
    return right


def _result(
    mine: Table, theirs: Table, names: list[str], close: float, far: float, pictures: Callable, gallery: int
) -> Result:  # fmt: skip
    labels, position, score = mine.read("label"), mine.read("position"), mine.read("score")
    x, y = (table.read("embedding").astype(np.float64) for table in (mine, theirs))
    pairs = mined(x, y, labels, close, far)
    numbers = {"pairs": float(len(pairs)), "examples": float(len(labels))}
    if not len(pairs):
        note = f"no two pictures of different classes are above {close} for the model and below {far} for the other"
        return Result(numbers, {}, notes=[note])
    of = score[pairs[:, :, None], labels[pairs][:, None, :]]  # [P, picture, name]
    shares = {
        "both_right": (of[:, 0, 0] > of[:, 0, 1]) & (of[:, 1, 1] > of[:, 1, 0]),
        "neighbour": neighbours_right(x, labels, pairs),
        "other/neighbour": neighbours_right(y, labels, pairs),
    }
    numbers |= {name: float(right.mean()) for name, right in shares.items()}
    artifacts = {"pairs": {"position": position[pairs], "label": labels[pairs]}}
    if gallery:
        shown = pairs[:gallery].ravel()
        partner = pairs[:gallery, ::-1].ravel()
        both = np.stack([labels[shown], labels[partner]], axis=1)
        found = np.take_along_axis(score[shown], both, axis=1)
        order = np.argsort(-found, axis=1, kind="stable")
        artifacts["gallery"] = {
            "images": pictures(position[shown]),
            "truth": [names[i] for i in labels[shown]],
            "names": [[names[i] for i in row] for row in np.take_along_axis(both, order, axis=1)],
            "scores": np.take_along_axis(found, order, axis=1),
        }
    return Result(numbers, artifacts, metrics.intervals(shares))
