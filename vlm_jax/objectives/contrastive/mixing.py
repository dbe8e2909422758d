"""Mixed embeddings: negatives on the shortest arc between an image and its text."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax import catalogue
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.objectives.contrastive import targets as targets_of
from vlm_jax.objectives.contrastive.similarity import vectors
from vlm_jax.objectives.term import WHERE, Term


@method(
    family="terms",
    system="m2-Mix",
    paper="arXiv:2203.03897",
    differs="negatives are mixtures of an image and its text, on the sphere",
)
def mixed(
    *,
    model: Any,
    beta: float = 0.5,
    share: float | None = None,
    scale: float | None = None,
    penalty: str | Mapping[str, Any] = "softmax",
    targets: str | Mapping[str, Any] = "identity",
) -> Term:
    """Images and texts against geodesic mixtures of the other pairs (m2-Mix, Oh et al. 2023).

        m_j = sin(q a_j) / sin(a_j) x_j + sin((1 - q) a_j) / sin(a_j) y_j,  cos(a_j) = <x_j, y_j>
        logits of image i: scale <x_i, y_i> and, for j != i, scale <x_i, m_j>
        logits of text i:  scale <x_i, y_i> and, for j != i, scale <m_j, y_i>

    q ~ Beta(beta, beta), one number a step, the share of the image. The loss is the sum of both directions; it stands
    beside `contrastive` in `terms`. With the share 0, the logits of images are those of `contrastive`.

    Args:
      model: linen module with two embeddings.
      beta: of the distribution of the share, above 0.
      share: the share, instead of a draw.
      scale: the factor on cosines; defaults to the model's.
      penalty: as for `contrastive`.
      targets: as for `contrastive`; matching pairs keep the cosine of image and text, as the diagonal does.

    Metrics: `alignment`, the mean of |x_i - y_i|^2, and `uniformity`, the log of the mean of exp(-2 |x_i - x_j|^2) over
    different rows, averaged over images and texts; less is better for both.
    """
    if beta <= 0:
        raise UserError(f"{WHERE}: beta is {beta}; expected a number above 0")
    penalty = catalogue.build("penalties", penalty, f"{WHERE}.penalty")
    targets = targets_of.build(targets, f"{WHERE}.targets")

    def features(outputs, ctx):
        return {**vectors(outputs), **targets.features(outputs)}

    def loss(outputs, features, rows, ctx):
        image, text = features["image"], features["text"]
        q = jax.random.beta(ctx.rng, beta, beta, dtype=image.dtype) if share is None else share
        mixture = geodesic(image, text, q)
        products = lambda x, y: jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
        cosines, bias = products(image, text), outputs["bias"]
        matches = targets.of(features, rows, len(image))
        factor = outputs["scale"] if scale is None else scale
        of_images = factor * jnp.where(matches[0] > 0, cosines, products(image, mixture))
        of_texts = factor * jnp.where(matches[1] > 0, cosines, products(mixture, text))
        if bias is not None:
            of_images, of_texts = of_images + bias, of_texts + bias
        metrics = {
            "alignment": jnp.mean(jnp.sum(jnp.square(image - text), axis=1)),
            "uniformity": (uniformity(image) + uniformity(text)) / 2,
        }
        return 2 * penalty.plain(of_images, of_texts, *matches), metrics

    return Term("mixed", features, loss)


def geodesic(x: jax.Array, y: jax.Array, share: jax.Array | float) -> jax.Array:
    """Returns the unit vectors [B, D] on the arcs from y (share 0) to x (share 1), both unit norm [B, D]."""
    cosine = jnp.sum(x * y, axis=-1, keepdims=True)
    straight = jnp.abs(cosine) > 1 - 1e-6  # no arc, or no shortest one
    angle = jnp.arccos(jnp.where(straight, 0, cosine))
    weight = lambda share: jnp.where(straight, share, jnp.sin(share * angle) / jnp.sin(angle))
    return weight(share) * x + weight(1 - share) * y


def uniformity(x: jax.Array) -> jax.Array:
    """Returns log mean exp(-2 |x_i - x_j|^2) over i != j, for unit norm x [B, D] (arXiv:2005.10242)."""
    square = 2 - 2 * jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST)
    different = ~jnp.eye(len(x), dtype=bool)
    return jax.nn.logsumexp(-2 * square, where=different) - jnp.log(len(x) * (len(x) - 1.0))
