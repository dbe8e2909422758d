"""Pictures and texts in the space that they share."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.collections import LineCollection

from vlm_jax.figures import style
from vlm_jax.figures.style import GREY, INK, Picture

NAMED = 12


class Plane(NamedTuple):
    """The plane in which embeddings of pictures and texts differ most.

    Attributes:
      image: float64 [n, 2].
      text: float64 [m, 2].
      explained: [2], the share of the variance along each direction.
      gap: |mean of images - mean of texts|, in the whole space (Liang et al. 2022, arXiv:2203.02053, section 2).
    """

    image: np.ndarray
    text: np.ndarray
    explained: np.ndarray
    gap: float


def principal_plane(image: Any, text: Any) -> Plane:
    """The first two principal components of pictures [n, D] and texts [m, D] together."""
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


@style.styled
def embedding_space(image: Any, text: Any, names: Sequence[str] | None = None) -> Picture:
    """Embeddings of pictures and texts in the plane of their first two principal components, and the gap between them.

    Args:
      image: float [n, D].
      text: float [m, D]; where m = n, text i belongs to picture i and a line joins them.
      names: of the texts, m; a dozen of them are written, evenly spaced.
    """
    plane = principal_plane(image, text)
    picture = Picture(figsize=(6.8, 5.6), layout="constrained")
    axes = picture.add_subplot()
    if len(plane.image) == len(plane.text):
        axes.add_collection(LineCollection(np.stack([plane.image, plane.text], 1), colors="#c8c8c8", linewidths=0.6))
    axes.scatter(*plane.image.T, s=16, marker="o", facecolors="white", edgecolors="#3b6ea5", linewidths=0.9,
                 label="pictures", zorder=3)  # fmt: skip
    axes.scatter(*plane.text.T, s=18, marker="^", color=INK, linewidths=0, label="texts", zorder=3)
    means = np.stack([plane.image.mean(axis=0), plane.text.mean(axis=0)])
    axes.plot(*means.T, "-", color="white", linewidth=4, zorder=4)
    axes.plot(*means.T, "-P", color=INK, markerfacecolor="white", markersize=10, linewidth=1.6, zorder=5, label="means")
    if names is not None:
        style.check(len(names) == len(plane.text), f"{len(plane.text)} names", names)
        for i in np.unique(np.linspace(0, len(names) - 1, min(NAMED, len(names))).round().astype(int)):
            axes.annotate(style.short(names[i], 24), plane.text[i], (3, 3), textcoords="offset points", fontsize=8,
                          color=GREY, zorder=6)  # fmt: skip
    first, second = 100 * plane.explained
    axes.set_title(f"gap between the means {plane.gap:.2f}")
    axes.set_xlabel(f"first principal component ({first:.0f} % of the variance)")
    axes.set_ylabel(f"second ({second:.0f} %)")
    axes.set_aspect("equal", "datalim")
    axes.legend(loc="best")
    return picture
