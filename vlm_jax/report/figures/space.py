"""Pictures and texts in their shared embedding space."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.patheffects import withStroke

from vlm_jax.report.figures import style
from vlm_jax.report.figures.style import INK, Picture

NAMED = 12


class Plane(NamedTuple):
    """Embeddings of pictures and texts on their first two principal components.

    Attributes:
      image: float64 [n, 2].
      text: float64 [m, 2].
      explained: [2], the share of the variance along each component.
      gap: |mean of images - mean of texts|, in the whole space (Liang et al. 2022, arXiv:2203.02053, section 2).
    """

    image: np.ndarray
    text: np.ndarray
    explained: np.ndarray
    gap: float


def principal_plane(image: Any, text: Any) -> Plane:
    """Projects pictures [n, D] and texts [m, D] on the first two principal components of both together."""
    image, text = np.asarray(image, np.float64), np.asarray(text, np.float64)
    style.check(image.ndim == text.ndim == 2 and image.shape[1] == text.shape[1] and len(image) and len(text),
                "embeddings [n, D] and [m, D]", image, text)  # fmt: skip
    both = np.concatenate([image, text])
    centred = both - both.mean(axis=0)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    points = np.zeros((len(both), 2))
    points[:, : len(directions)] = centred @ directions[:2].T
    explained = np.zeros(2)
    explained[: len(singular)] = singular[:2] ** 2 / max(np.sum(singular**2), 1e-12)
    gap = float(np.linalg.norm(image.mean(axis=0) - text.mean(axis=0)))
    return Plane(points[: len(image)], points[len(image) :], explained, gap)


@style.styled()
def embedding_space(image: Any, text: Any, names: Sequence[str] | None = None) -> Picture:
    """Draws embeddings of pictures and texts on their first two principal components, and the gap between the means.

    Args:
      image: float [n, D].
      text: float [m, D]; if m = n, text i belongs to picture i and a line joins the two.
      names: m names of the texts; at most a dozen are written, where there is room.
    """
    plane = principal_plane(image, text)
    width, height = np.ptp(np.concatenate([plane.image, plane.text]), axis=0)
    picture = Picture(figsize=(7.2, np.clip(1.2 + 6 * height / max(width, 1e-12), 3.4, 7)), layout="constrained")
    axes = picture.add_subplot()
    if len(plane.image) == len(plane.text):
        axes.add_collection(LineCollection(np.stack([plane.image, plane.text], 1), colors="#c4c4c4", linewidths=0.6))
    axes.scatter(*plane.image.T, s=16, marker="o", facecolors="white", edgecolors="#3b6ea5", linewidths=0.9,
                 label="pictures", zorder=3)  # fmt: skip
    axes.scatter(*plane.text.T, s=18, marker="^", color=INK, linewidths=0, label="texts", zorder=3)
    means = np.stack([plane.image.mean(axis=0), plane.text.mean(axis=0)])
    axes.plot(*means.T, "-", color="white", linewidth=4, zorder=4)
    axes.plot(*means.T, "-", color=INK, linewidth=1.6, zorder=5, label="between their means")
    axes.plot(*means[0], "o", color="white", markeredgecolor="#3b6ea5", markersize=11, markeredgewidth=2.4, zorder=5)
    axes.plot(*means[1], "^", color=INK, markeredgecolor="white", markersize=13, markeredgewidth=1.2, zorder=5)
    if names is not None:
        style.check(len(names) == len(plane.text), f"{len(plane.text)} names", names)
        names = [style.short(name, 24) for name in names]
        for i in _labelled(plane.text, names, means, width / 6):
            label = axes.annotate(names[i], plane.text[i], (4, 4), textcoords="offset points",
                                  fontsize=8, color=INK, zorder=6)  # fmt: skip
            label.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
    first, second = 100 * plane.explained
    axes.set_title(f"gap between the means {plane.gap:.2f}")
    axes.set_xlabel(f"first principal component ({first:.0f} % of the variance)")
    axes.set_ylabel(f"second ({second:.0f} %)")
    axes.set_aspect("equal", "datalim")
    axes.legend(loc="best")
    return picture


def _labelled(points: np.ndarray, names: Sequence[str], marks: np.ndarray, inch: float) -> list[int]:
    """Indices of points [n, 2] whose names fit beside them; each point is the farthest from the earlier ones.

    Args: the points, their names, marks [m, 2] to leave free, and the length of an inch of paper.
    """
    written = np.concatenate([marks - 0.12 * inch, marks + 0.12 * inch], axis=1)
    chosen, distance = [], np.full(len(points), np.inf)
    while len(chosen) < NAMED and distance.max(initial=0) > 0:
        i = int(distance.argmax())
        distance = np.minimum(distance, np.linalg.norm(points - points[i], axis=1))
        left, low = points[i]
        box = np.array([left, low, left + (0.1 + 0.075 * len(names[i])) * inch, low + 0.16 * inch])
        if not np.any(np.all((written[:, :2] < box[2:]) & (box[:2] < written[:, 2:]), axis=1)):
            chosen.append(i)
            written = np.concatenate([written, box[None]])
    return chosen
