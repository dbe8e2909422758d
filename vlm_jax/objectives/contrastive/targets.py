"""Targets: which pairs of a batch's images and texts match, and how much."""

from collections.abc import Callable, Mapping, Sequence
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

    return Targets(labels=lambda rows, size: column(rows, key, size))


def column(rows: Mapping[str, Any], key: str, size: int, where: str = f"{WHERE}.targets") -> jax.Array:
    """Returns the entry `key` of the rows, [B].

    Raises:
      UserError: the batch lacks the key, or its shape is another.
    """
    if key not in rows:
        raise UserError(f"{where} is `{key}`, which the batch lacks; expected `identity` or one of: {', '.join(rows)}")
    if rows[key].shape != (size,):
        raise UserError(f"{where} `{key}` has shape {rows[key].shape} in the batch; expected ({size},)")
    return rows[key]


@method(
    family="targets",
    system="TIP-CLIP",
    paper="arXiv:2305.10434",
    differs="texts that show nothing have one NULL image in common",
    needs={"objective.targets.key": "visual"},
)
def null_image(*, key: str = "visual") -> Targets:
    """Text i describes image i; texts that show nothing describe one NULL image (TIP-CLIP, Verma et al. 2023).

    `key` is bool [B], False for a text that shows nothing, whose image is the NULL image: the op `null_image(key)`.
    All NULL images of a batch and all such texts match each other. The visualness of a text is minus its similarity to
    the NULL image. If all texts are visual, the targets are the identity.
    """

    def of(rows, size):
        return jnp.where(column(rows, key, size).astype(bool), jnp.arange(size), size)

    return Targets(labels=of)


@method(
    family="targets",
    system="CWCL",
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
        cosines = cosines_of(features["anchor"])
        return (1 + cosines) / 2, jnp.eye(len(cosines), dtype=cosines.dtype)

    return Targets(weights=weights, features=features)


@method(
    family="targets",
    system="MobileCLIP",
    paper="arXiv:2311.17049",
    differs="texts describe an image as much as teachers say, each by the softmax over the batch",
    needs={"objective.teachers": {"teacher": {"decay": 1.0}}},
)
def affinities(*, teachers: Sequence[str] = ("teacher",), scale: float = 100.0) -> Targets:
    """Rows (images -> texts) or columns (texts -> images) of softmax(scale x cosine) by each teacher, their mean.

    The distillation of MobileCLIP (Vasu et al. 2024): the softmax penalty is then the cross-entropy between the
    teachers' and the model's distributions, the KL divergence plus what no parameter changes.

    Args:
      teachers: names of teachers with two embeddings, of any widths.
      scale: 1 / temperature of the teachers.
    """

    def features(outputs):
        seen = [
            (outputs.teacher(name)["image_embedding"], outputs.teacher(name)["text_embedding"]) for name in teachers
        ]
        return {"affinities": jax.lax.stop_gradient(seen)}

    def weights(features):
        logits = [scale * _product(image, text.T) for image, text in features["affinities"]]
        return tuple(sum(jax.nn.softmax(one, axis) for one in logits) / len(logits) for axis in (1, 0))

    return Targets(weights=weights, features=features)


def cosines_of(x: jax.Array, y: jax.Array | None = None) -> jax.Array:
    """Returns the cosines [B, M] of all pairs of rows of x, [B, D], and of y, [M, D]; without y, of x and x."""

    def unit(x):
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

    return _product(unit(x), unit(x if y is None else y).T)


def _product(x, y):
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
