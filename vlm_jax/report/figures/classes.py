"""Figures of predictions: galleries and confusions."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_jax.report.figures import style
from vlm_jax.report.figures.style import BAR, BLUE, GREY, INK, SHARES, Picture, short


@style.styled()
def gallery(
    images: Sequence[Any], names: Sequence[Sequence[str]], scores: Any, truth: Sequence[str] | None = None
) -> Picture:
    """Draws pictures, each with its best names, their scores as bars, and a tick at the right name.

    All bars have one scale, from 0 (or the lowest score below) to the highest score of all pictures.

    Args:
      images: n pictures.
      names: n lists of k names, best first.
      scores: float [n, k].
      truth: n right names; a right name that is not among the best stands below, after a cross.
    """
    images, scores = style.pixels(images), np.asarray(scores, np.float64)
    truth = [None] * len(images) if truth is None else truth
    counts = (len(images), len(names), len(scores), len(truth))
    style.check(len(set(counts)) == 1, "as many names, scores and truths as images", *map(np.zeros, counts))
    low, high = min(scores.min(), 0.0), max(scores.max(), 1e-6)
    rows, columns = style.grid(len(images), 3)
    picture = Picture(figsize=(3.6 * columns, 1.28 * rows))
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        left, bottom = column / columns, 1 - (row + 1) / rows
        style.show(picture.add_axes((left, bottom + 0.1 / rows, 0.27 / columns, 0.8 / rows)), image)
        axes = picture.add_axes((left + 0.29 / columns, bottom + 0.04 / rows, 0.68 / columns, 0.92 / rows))
        _names(axes, names[i], truth[i], (scores[i] - low) / (high - low), scores[i])
    return picture


def _names(axes: Any, names: Sequence[str], truth: str | None, lengths: np.ndarray, scores: np.ndarray) -> None:
    for j, (name, length, score) in enumerate(zip(names, lengths, scores, strict=True)):
        right = name == truth
        axes.barh(-j, length, height=0.82, color=BLUE if right else BAR, hatch="///" if right else None,
                  edgecolor="#9dbbd8" if right else BAR, linewidth=0)  # fmt: skip
        weight = "bold" if right else "normal"
        text = f"✓ {short(name)}" if right else short(name)
        axes.text(0.015, -j, text, va="center", color=INK, weight=weight, fontsize=8)
        axes.text(1.16, -j, f"{score:z.2f}", va="center", ha="right", color=GREY, fontsize=7)
    if truth is not None and truth not in names:
        axes.text(0.015, -len(names), f"✗ {short(truth, 40)}", va="center", color=INK, fontsize=8, style="italic")
    axes.set_xlim(0, 1.16)
    axes.set_ylim(-max(len(names), 3) - 0.5, 0.5)
    axes.axis("off")


@style.styled()
def confusions(
    pairs: Sequence[tuple[str, str, int]], names: Sequence[str] = (), images: Sequence[Any] = (), most: int = 18
) -> Picture:
    """Draws pairs of confused classes: the right class, an arrow with the count, the predicted class.

    Args:
      pairs: (right class, predicted class, count), the most important first.
      names: the classes that have a picture.
      images: the pictures of these classes.
      most: number of pairs drawn, at most.
    """
    pairs = pairs[:most]
    style.check(len(pairs) > 0, "at least one pair", pairs)
    pictures = dict(zip(names, map(style.pixel, images), strict=True))
    rows, columns = style.grid(len(pairs), 3)
    picture = Picture(figsize=(3.6 * columns, 1.5 * rows))
    for i, (true, predicted, count) in enumerate(pairs):
        row, column = divmod(i, columns)
        left, bottom = column / columns, 1 - (row + 1) / rows
        for name, at, ink in ((true, 0.0, INK), (predicted, 0.44, GREY)):
            axes = picture.add_axes((left + at / columns, bottom + 0.34 / rows, 0.4 / columns, 0.62 / rows))
            axes.axis("off")
            if name in pictures:
                axes.imshow(pictures[name])
            else:
                axes.text(0.5, 0.5, "(no picture)", ha="center", va="center", fontsize=8, color=GREY)
            picture.text(left + (at + 0.2) / columns, bottom + 0.3 / rows, style.wrapped(name, 21, 2),
                         ha="center", va="top", fontsize=8, color=ink)  # fmt: skip
        middle = left + 0.42 / columns
        picture.text(middle, bottom + 0.65 / rows, "→", ha="center", va="center", fontsize=13, color=INK)
        if count > 1:
            picture.text(middle, bottom + 0.48 / rows, f"×{count}", ha="center", fontsize=8, color=INK)
    return picture


def confusion_counts(truth: Any, predicted: Any, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns which classes a confusion matrix shows, int [c], and its counts, int [c, c + 1].

    The classes are, first, both classes of the most frequent mistakes, then the classes with the most examples; at most
    `most`. Row: the right class. Column: the predicted class; the last column is all other classes.

    Args:
      truth: int [n].
      predicted: int [n].
      most: number of classes, at most.
    """
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    style.check(truth.shape == predicted.shape and truth.ndim == 1 and truth.size, "truth [n] and predicted [n]",
                truth, predicted)  # fmt: skip
    wrong = truth != predicted
    count = max(truth.max(), predicted.max()) + 1
    errors = np.bincount(truth[wrong], minlength=count) + np.bincount(predicted[wrong], minlength=count)
    pairs, times = np.unique(np.sort(np.stack([truth, predicted], 1)[wrong], axis=1), axis=0, return_counts=True)
    worst = pairs[np.lexsort((-errors[pairs].sum(1), -times))]
    examples = np.bincount(truth, minlength=count)
    often = np.argsort(-examples, kind="stable")[: np.count_nonzero(examples)]
    order = [*worst.ravel().tolist(), *often.tolist()]
    shown = np.array(list(dict.fromkeys(order))[:most])
    column = np.full(count, len(shown))
    column[shown] = np.arange(len(shown))
    counts = np.zeros((len(shown) + 1, len(shown) + 1), np.int64)
    np.add.at(counts, (column[truth], column[predicted]), 1)
    return shown, counts[:-1]


@style.styled()
def confusion_matrix(truth: Any, predicted: Any, names: Sequence[str], most: int = 20) -> Picture:
    """Draws the confusion matrix of the most frequent mistakes: rows are right classes, columns predicted classes.

    A cell's number counts pictures; its shade is the share of the row; the last column is all other classes.

    Args:
      truth: int [n], index of the right name.
      predicted: int [n], index of the best name.
      names: names of the classes.
      most: number of classes shown, at most.
    """
    shown, counts = confusion_counts(truth, predicted, most)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    rows, columns = counts.shape
    labels = [short(names[i], 22) for i in shown]
    picture = Picture(figsize=(3.0 + 0.36 * columns, 2.0 + 0.3 * rows), layout="constrained")
    axes = picture.add_subplot()
    axes.pcolormesh(shares, cmap=SHARES, vmin=0, vmax=1, edgecolors="#d0d0d0", linewidth=0.5)
    for (i, j), number in np.ndenumerate(counts):
        if number:
            axes.text(j + 0.5, i + 0.5, str(number), ha="center", va="center", fontsize=8,
                      color=style.ink_on(shares[i, j]), weight="bold" if i == j else "normal")  # fmt: skip
    axes.set_xticks(np.arange(columns) + 0.5, [*labels, "any other"], rotation=45, ha="left", rotation_mode="anchor")
    axes.set_yticks(np.arange(rows) + 0.5, labels)
    axes.axvline(rows, color=INK, linewidth=1.2)
    axes.invert_yaxis()
    axes.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_ylabel("right class")
    axes.set_xlabel("taken for (number: pictures, shade: share of the row)")
    return picture


@style.styled()
def confusion_map(truth: Any, predicted: Any, names: Sequence[str]) -> Picture:
    """Draws the confusion matrix of all classes that have pictures or were predicted, in their order, without numbers.

    Args: see `confusion_matrix`.
    """
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    shown, place = np.unique(np.concatenate([truth, predicted]), return_inverse=True)
    counts = np.zeros((len(shown), len(shown)), np.int64)
    np.add.at(counts, tuple(np.split(place, 2)), 1)
    picture = Picture(figsize=(6.0, 5.6), layout="constrained")
    axes = picture.add_subplot()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    edges = (-0.5, len(shown) - 0.5)
    fine = np.kron(shares, np.ones((max(1, 800 // len(shown)),) * 2))  # viewers blur pictures that they enlarge
    axes.imshow(fine, cmap=SHARES, vmin=0, vmax=1, interpolation="none", extent=(*edges, *edges[::-1]))
    ticks = np.unique(np.linspace(0, len(shown) - 1, 9).round().astype(int))
    labels = [short(names[shown[i]], 18) for i in ticks]
    axes.set_xticks(ticks, labels, rotation=45, ha="left", rotation_mode="anchor")
    axes.set_yticks(ticks, labels)
    axes.tick_params(length=2, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.grid(False)
    axes.set_ylabel("right class")
    axes.set_xlabel(f"taken for ({len(shown):,} classes; shade: share of the row, from 0 to 100 %)")
    return picture
