"""Targets: which pairs of a batch's images and texts match, and how much."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax import catalogue
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.objectives.term import WHERE


class Targets(NamedTuple):
    """Which pairs match. Either `labels` or `weights` is given.

    Attributes:
      labels: (rows, B) -> int [B]; an image and a text with equal labels match.
      weights: (features) -> (of images [B, B], of texts [B, B]), images in rows, texts in columns, at least 0: how much
        text j describes image i, for the losses image -> texts and text -> images.
      features: (outputs) -> dict of arrays that `weights` reads, [B, ...].
      differ: whether no two labels are equal, so that text i is the only positive of image i.
    """

    labels: Callable | None = None
    weights: Callable | None = None
    features: Callable = lambda outputs: {}
    differ: bool = False

    def of(self, features: Mapping[str, Any], rows: Mapping[str, Any], size: int) -> tuple[jax.Array, jax.Array]:
        """Returns what matches, bool or weights, for both directions, each [B, B]."""
        if self.weights is not None:
            return self.weights(features)
        if self.differ:
            matches = jnp.eye(size, dtype=bool)
        else:
            labels = self.labels(rows, size)
            matches = labels[:, None] == labels[None, :]
        return matches, matches


def build(spec: str | Mapping[str, Any], where: str) -> Targets:
    """Returns the targets of a name or section; another string is the batch key of `labels`."""
    if isinstance(spec, str) and spec not in catalogue.of("targets"):
        return labels(key=spec)
    return catalogue.build("targets", spec, where)


@method(family="targets", paper="arXiv:2103.00020", where="figure 3", differs="text i describes image i alone")
def identity() -> Targets:
    """Text i is the only text of image i."""
    return Targets(labels=lambda rows, size: jnp.arange(size), differ=True)


@method(
    family="targets",
    paper="arXiv:2004.11362",
    where="equation 2",
    differs="images and texts with equal labels match",
    needs={"objective.targets.key": "concept"},
)
def labels(*, key: str) -> Targets:
    """Images and texts with equal values of the batch's `key`, [B], match."""

    def of(rows, size):
        if key not in rows:
            raise UserError(
                f"{WHERE}.targets is `{key}`, which the batch lacks; expected `identity` or one of: {', '.join(rows)}"
            )
        if rows[key].shape != (size,):
            raise UserError(f"{WHERE}.targets `{key}` has shape {rows[key].shape} in the batch; expected ({size},)")
        return rows[key]

    return Targets(labels=of)


@method(
    family="targets",
    paper="arXiv:2309.14580",
    where="equation 4",
    differs="a text describes other images as well, by how much they look like its own",
)
def cwcl(*, anchor: str = "image_embedding", teacher: str | None = None) -> Targets:
    """w_ij = (1 + cos(p_i, p_j)) / 2 for images -> texts, the identity for texts -> images (CWCL).

    p are the outputs `anchor`, [B, D], of the model, or of a teacher; the paper's come from a locked tower. No gradient
    flows to them. The softmax divides each row of w by its sum.
    """

    def features(outputs):
        given = outputs.teacher(teacher) if teacher else outputs
        return {"anchor": jax.lax.stop_gradient(given[anchor])}

    def weights(features):
        p = features["anchor"].astype(jnp.promote_types(features["anchor"].dtype, jnp.float32))
        p = p / jnp.maximum(jnp.linalg.norm(p, axis=-1, keepdims=True), 1e-12)
        cosines = jnp.matmul(p, p.T, precision=jax.lax.Precision.HIGHEST)
        return (1 + cosines) / 2, jnp.eye(len(p), dtype=cosines.dtype)

    return Targets(weights=weights, features=features)
