"""Pictures against texts: similarity matrices and retrieval results."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.patches import Rectangle

from vlm_jax.report.figures import style
from vlm_jax.report.figures.style import GREY, INK, SHARES, Picture


@style.styled()
def similarity(images: Sequence[Any], texts: Sequence[str], scores: Any) -> Picture:
    """Draws a matrix of scores, pictures down the side, texts along the top.

    A frame marks each picture's best text.

    Args:
      images: n pictures.
      texts: m texts.
      scores: float [n, m].
    """
    images, scores = style.pixels(images), np.asarray(scores, np.float64)
    style.check(scores.shape == (len(images), len(texts)), f"scores [{len(images)}, {len(texts)}]", scores)
    rows, columns = scores.shape
    picture = Picture(figsize=(1.6 + 0.62 * columns, 1.7 + 0.55 * rows), layout="constrained")
    axes = picture.add_subplot()
    low, high = scores.min(), max(scores.max(), scores.min() + 1e-9)
    axes.pcolormesh(scores, cmap=SHARES, vmin=low, vmax=high, edgecolors="white", linewidth=1)
    decimals = 2 if np.abs(scores).max() < 10 else 1 if np.abs(scores).max() < 100 else 0
    for (i, j), score in np.ndenumerate(scores):
        ink = style.ink_on((score - low) / (high - low))
        axes.text(j + 0.5, i + 0.5, f"{score:z.{decimals}f}", ha="center", va="center", fontsize=8, color=ink)
    for i, best in enumerate(scores.argmax(axis=1)):
        for edge, margin, line in ((INK, 0.04, 1.8), ("white", 0.09, 1.0)):  # visible on light and on dark
            corner, side = (best + margin, i + margin), 1 - 2 * margin
            axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=edge, linewidth=line))
    for i, image in enumerate(images):
        inset = axes.inset_axes((-1.05, i + 0.03, 0.94, 0.94), transform=axes.transData)
        style.show(inset, image)
        inset.set_anchor("E")
    labels = [style.short(text, 34) for text in texts]
    axes.set_xticks(np.arange(columns) + 0.5, labels, rotation=40, ha="left", rotation_mode="anchor")
    axes.set_yticks([])
    axes.set_xlabel(f"shade: from {low:z.{decimals}f} to {high:z.{decimals}f}")
    axes.invert_yaxis()
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return picture


@style.styled()
def retrieval(queries: Sequence[Any], results: Sequence[Sequence[Any]], scores: Any, right: Any) -> Picture:
    """Draws a row for each query: the query, then its results, best first.

    A frame and a tick mark right results.

    Args:
      queries: n texts or pictures.
      results: n rows of k pictures or texts.
      scores: float [n, k].
      right: bool [n, k].
    """
    scores, right = np.asarray(scores, np.float64), np.asarray(right, bool)
    rows, columns = len(results), len(results[0]) if len(results) else 0
    style.check(rows and columns and len(queries) == rows and scores.shape == right.shape == (rows, columns),
                "as many rows of results, scores and marks as queries", queries, scores, right)  # fmt: skip
    wide = 1.9 if isinstance(queries[0], str) else 1.25  # inches of the query's column
    cell = 1.9 if isinstance(results[0][0], str) else 1.15
    width, height = wide + 0.25 + cell * columns, 1.45 * rows
    picture = Picture(figsize=(width, height))
    axes_at = lambda left, row, side: picture.add_axes(
        (left / width, 1 - (1.45 * row + 1.15) / height, side / width, 1.08 / height)
    )
    for i in range(rows):
        _thing(axes_at(0.08, i, wide - 0.16), queries[i], 24, bold=True)
        picture.text((wide + 0.09) / width, 1 - (1.45 * i + 0.6) / height, "→", ha="center", va="center", fontsize=12)
        for j in range(columns):
            left = wide + 0.25 + cell * j
            axes = axes_at(left, i, cell - 0.1)
            _thing(axes, results[i][j], 24)
            if right[i, j]:
                axes.axis("on")
                axes.set(xticks=[], yticks=[])
                axes.grid(False)
                axes.spines[:].set(visible=True, color=INK, linewidth=2.5)
            picture.text((left + (cell - 0.1) / 2) / width, 1 - (1.45 * i + 1.2) / height,
                         f"{'✓ ' if right[i, j] else ''}{scores[i, j]:z.2f}", ha="center", va="top", fontsize=8,
                         color=INK if right[i, j] else GREY, weight="bold" if right[i, j] else "normal")  # fmt: skip
    return picture


def _thing(axes: Any, thing: Any, width: int, bold: bool = False) -> None:
    if not isinstance(thing, str):
        return style.show(axes, style.pixel(thing))
    axes.axis("off")
    axes.text(0.5, 0.5, style.wrapped(thing, width, 5), transform=axes.transAxes, ha="center", va="center",
              fontsize=9, color=INK, weight="bold" if bold else "normal")  # fmt: skip
