"""Contrastive objectives: similarity x targets x penalty, over all pairs of the global batch.

Written over global arrays: under `jit` with the batch sharded over devices, every device's examples are negatives of
every other's. These are the plain forms, which hold the logits [B, B] in fp32.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax import config
from vlm_jax.errors import UserError
from vlm_jax.objectives.objective import Objective

WHERE = "config.objective"


class Similarity(NamedTuple):
    """How well an image and a text match, before scale and bias.

    Attributes:
      features: what is kept of the model's `Embeddings`: pytree, leading axis B.
      scores: features -> [B, B], images in rows, texts in columns.
    """

    features: Callable
    scores: Callable


def cosine() -> Similarity:
    """z_i . z_j of unit-norm global embeddings."""

    def scores(features):
        image, text = features["image"], features["text"]
        dtype = jnp.promote_types(image.dtype, jnp.float32)
        return jnp.matmul(image.astype(dtype), text.astype(dtype).T, precision=jax.lax.Precision.HIGHEST)

    return Similarity(lambda embeddings: {"image": embeddings.image, "text": embeddings.text}, scores)


SIMILARITIES = {"cosine": cosine}


def positives(targets: str, batch: Mapping[str, Any], size: int) -> jax.Array:
    """Returns bool [B, B]: which texts (columns) describe which images (rows).

    Args:
      targets: "identity": text i describes image i alone; or a batch key whose entry has shape [B]: equal values
        describe each other.
      batch: the batch.
      size: B.
    """
    if targets == "identity":
        return jnp.eye(size, dtype=bool)
    if targets not in batch:
        raise UserError(
            f"{WHERE}.targets is `{targets}`, which the batch lacks; expected `identity` or one of: {', '.join(batch)}"
        )
    labels = batch[targets]
    if labels.shape != (size,):
        raise UserError(f"{WHERE}.targets `{targets}` has shape {labels.shape} in the batch; expected ({size},)")
    return labels[:, None] == labels[None, :]


def softmax(*, label_smoothing: float = 0.0) -> Callable:
    """Mean of the cross-entropies image -> texts and text -> images (CLIP, Radford et al. 2021, Figure 3).

    A row's target is uniform over its positives (Khosla et al. 2020, arXiv:2004.11362, eq. 2, L_out), a column's over
    its own; `label_smoothing` moves that share of it to the uniform distribution over all.

    Returns:
      `penalty(logits [B, B], positives [B, B]) -> scalar`.
    """

    def cross_entropy(logits, positives, axis):
        target = positives / jnp.sum(positives, axis, keepdims=True, dtype=logits.dtype)
        target = (1 - label_smoothing) * target + label_smoothing / logits.shape[axis]
        return jnp.mean(jax.nn.logsumexp(logits, axis) - jnp.sum(target * logits, axis))

    return lambda logits, positives: 0.5 * sum(cross_entropy(logits, positives, axis) for axis in (1, 0))


def sigmoid() -> Callable:
    """-1/B sum_ij log sigmoid(s_ij x_ij), s = +1 for positives, else -1 (SigLIP, arXiv:2303.15343, Section 3.2).

    Returns:
      `penalty(logits x [B, B], positives [B, B]) -> scalar`.
    """
    return lambda logits, positives: (
        -jnp.mean(jnp.sum(jax.nn.log_sigmoid(jnp.where(positives, logits, -logits)), axis=1))
    )


PENALTIES = {"softmax": softmax, "sigmoid": sigmoid}


def contrastive(
    *,
    model: Any,
    penalty: str | Mapping[str, Any] = "softmax",
    similarity: str | Mapping[str, Any] = "cosine",
    targets: str = "identity",
    max_scale: float | None = None,
) -> Objective:
    """An objective on a model that returns `Embeddings`; logits are scale x similarity + bias.

    Args:
      model: linen module, `apply({"params": p}, images, token_ids, train=...) -> Embeddings`.
      penalty: "softmax", "sigmoid", or a dict with the name and options, `dict(name="softmax", label_smoothing=0.1)`.
      similarity: "cosine".
      targets: "identity", or a batch key such as "concept": pictures and texts of equal value are positives.
      max_scale: the scale is at most this (100 in CLIP, Section 2.5); gradients that lower it still pass.

    Metrics: `accuracy_image_to_text` (the share of images for which a positive beats every negative),
    `accuracy_text_to_image`, `scale`, and `bias` where the model has one.
    """
    similarity = _part(SIMILARITIES, similarity, f"{WHERE}.similarity")
    penalty = _part(PENALTIES, penalty, f"{WHERE}.penalty")

    def encode(params, batch, rng):
        for key in ("image", "token_ids"):
            if key not in batch:
                raise UserError(f"{WHERE}: the batch lacks `{key}`, it has: {', '.join(batch)}; see config.data.ops")
        rngs = None if rng is None else {"dropout": rng}
        embeddings = model.apply(
            {"params": params}, batch["image"], batch["token_ids"], train=rng is not None, rngs=rngs
        )
        return similarity.features(embeddings)

    def loss(params, features, batch):
        embeddings = model.apply({"params": params}, None, None)
        scale, bias = embeddings.scale, embeddings.bias
        if max_scale is not None:
            scale = at_most(scale, max_scale)
        logits = scale * similarity.scores(features)
        metrics = {"scale": scale}
        if bias is not None:
            logits += bias
            metrics["bias"] = bias
        matches = positives(targets, batch, logits.shape[0])
        metrics["accuracy_image_to_text"] = accuracy(logits, matches, axis=1)
        metrics["accuracy_text_to_image"] = accuracy(logits, matches, axis=0)
        value = penalty(logits, matches)
        return value, metrics | {"loss": value}

    return Objective(encode, loss)


def accuracy(logits: jax.Array, positives: jax.Array, axis: int) -> jax.Array:
    """The share of rows (axis=1) or columns (axis=0) where a positive is above every negative; a tie is a miss."""
    best = lambda where: jnp.max(logits, axis, initial=-jnp.inf, where=where)
    return jnp.mean(best(positives) > best(~positives))


@jax.custom_vjp
def at_most(x: jax.Array, ceiling: float) -> jax.Array:
    """min(x, ceiling), whose gradient at the ceiling passes where descent would lower x: it can come down again."""
    return jnp.minimum(x, ceiling)


at_most.defvjp(
    lambda x, ceiling: (jnp.minimum(x, ceiling), x < ceiling),
    lambda below, g: (jnp.where(below | (g > 0), g, 0), None),
)


def _part(options: Mapping[str, Callable], spec: str | Mapping[str, Any], where: str) -> Any:
    """Builds one part of the composition from its name, or from a dict with its name and arguments."""
    arguments = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = arguments.pop("name", None)
    return config.call(config.choose(options, name, where), arguments, where)
