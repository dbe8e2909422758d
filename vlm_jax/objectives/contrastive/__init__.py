"""Contrastive objectives: similarity x targets x penalty, over all pairs of the global batch.

The code works on global arrays: under `jit` with a batch sharded over devices, the examples of every device are
negatives for all other devices.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax import catalogue
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.kernels import contrastive as kernel
from vlm_jax.objectives.contrastive.penalty import Pairs
from vlm_jax.objectives.contrastive.targets import labels_of, positives
from vlm_jax.objectives.objective import WHERE, Objective, model_inputs


@method(
    family="objectives",
    paper="arXiv:2103.00020",
    where="section 2.3",
    differs="pairs against all other pairs of the global batch: similarity x targets x penalty",
)
def contrastive(
    *,
    model: Any,
    penalty: str | Mapping[str, Any] = "softmax",
    similarity: str | Mapping[str, Any] = "cosine",
    targets: str = "identity",
    max_scale: float | None = None,
    mask: str | None = None,
    implementation: str | None = None,
) -> Objective:
    """Returns the objective of a model with `Embeddings`; logits are scale x similarity + bias.

    Args:
      model: linen module, `apply({"params": p}, images, token_ids, train=...) -> Embeddings`.
      penalty: "softmax", "sigmoid", or a dict with the name and options, `dict(name="softmax", label_smoothing=0.1)`.
      similarity: "cosine" or "token_wise", for towers with pool "all".
      targets: "identity", or a batch key such as "concept": pictures and texts with equal values are positives.
      max_scale: upper limit of the scale (100 in CLIP, Section 2.5); gradients that lower the scale still pass.
      mask: a batch key, bool [B]; examples with False are no negatives, and loss and metrics ignore them.
      implementation: that of `kernels.contrastive`. None holds all logits of a small batch on one device, and otherwise
        one block of logits at a time. Several devices without a mesh (`jax.set_mesh`) together hold all logits.

    Metrics: `accuracy_image_to_text` (the share of images with a positive above every negative),
    `accuracy_text_to_image`, `scale`, and `bias` if the model has a bias.
    """
    similarity = catalogue.build("similarities", similarity, f"{WHERE}.similarity")
    if similarity.embeddings is None and (mask is not None or implementation is not None):
        raise UserError(f"{WHERE}.mask and implementation need the similarity `cosine`; the kernels support no other")
    penalty = catalogue.build("penalties", penalty, f"{WHERE}.penalty")

    def encode(params, batch, rng):
        rngs = None if rng is None else {"dropout": rng}
        embeddings = model.apply({"params": params}, *model_inputs(batch), train=rng is not None, rngs=rngs)
        return similarity.features(embeddings)

    def loss(params, features, batch):
        embeddings = model.apply({"params": params}, None, None)
        scale, bias = embeddings.scale, embeddings.bias
        if max_scale is not None:
            scale = at_most(scale, max_scale)
        metrics = {"scale": scale} | ({} if bias is None else {"bias": bias})
        if by_pairs(features):
            pairs = pairs_of(features, batch, scale, bias)
            value, *results = penalty.of_pairs(pairs)
            accuracies = [pairs.mean(result.best_positive > result.best_negative) for result in results]
        else:
            logits = [scale * scores for scores in similarity.scores(features)]
            if bias is not None:
                logits = [one + bias for one in logits]
            matches = positives(targets, batch, len(logits[0]))
            value = penalty.plain(*logits, matches)
            accuracies = [accuracy(one, matches, axis) for one, axis in zip(logits, (1, 0), strict=True)]
        names = "accuracy_image_to_text", "accuracy_text_to_image"
        return value, metrics | dict(zip(names, accuracies, strict=True)) | {"loss": value}

    def by_pairs(features):
        if similarity.embeddings is None:
            return False
        if mask is not None or implementation is not None:
            return True
        if jax.sharding.get_abstract_mesh().empty and jax.device_count() > 1:
            return False
        return kernel.explain(*similarity.embeddings(features)).implementation != "reference"

    def pairs_of(features, batch, scale, bias):
        image, text = similarity.embeddings(features)
        if mask is not None and mask not in batch:
            raise UserError(f"{WHERE}.mask is `{mask}`, which the batch lacks; it has: {', '.join(batch)}")
        dtype = jnp.promote_types(image.dtype, jnp.float32)
        scale, bias = scale.astype(dtype), None if bias is None else bias.astype(dtype)
        labels = labels_of(targets, batch, len(image))
        valid = None if mask is None else batch[mask]
        return Pairs(image, text, scale, bias, labels, targets == "identity", valid, implementation)

    return Objective(encode, loss)


def accuracy(logits: jax.Array, positives: jax.Array, axis: int) -> jax.Array:
    """Returns the share of rows (axis=1) or columns (axis=0) with a positive above every negative; a tie is a miss."""
    best = lambda where: jnp.max(logits, axis, initial=-jnp.inf, where=where)
    return jnp.mean(best(positives) > best(~positives))


@jax.custom_vjp
def at_most(x: jax.Array, ceiling: float) -> jax.Array:
    """Returns min(x, ceiling). At the ceiling, gradients that lower x still pass, so that x can come down again."""
    return jnp.minimum(x, ceiling)


at_most.defvjp(
    lambda x, ceiling: (jnp.minimum(x, ceiling), x < ceiling),
    lambda below, g: (jnp.where(below | (g > 0), g, 0), None),
)
