"""Symile: a contrastive loss over any number of modalities."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.catalogue import method
from vlm_jax.objectives.term import Term


@method(
    family="terms",
    paper="arXiv:2411.01053",
    differs="rows of three or more modalities against rows with shuffled parts, by the multilinear inner product",
    needs={"model.name": "many_tower"},
)
def symile(*, model: Any, of: Sequence[str] = ("image_embedding", "text_embedding", "audio_embedding")) -> Term:
    """Mean over anchors of -log softmax of scale x sum_d a_d b_d c_d ... (Symile, Saporta et al. 2024).

    Each modality in turn is the anchor. Its negatives are the batch's tuples of the other modalities, of which all but
    the first are shuffled, so that a negative's parts come from different rows. For two modalities the loss is CLIP's.

    Args:
      model: linen module.
      of: outputs that are compared, [B, D] each.

    Metrics: `accuracy`, of the first anchor, and `scale`.
    """

    def loss(outputs, features, rows, ctx):
        values, accuracies = [], []
        for place, name in enumerate(of):
            first, *others = [features[other] for other in (*of[place + 1 :], *of[:place])]
            own, negative = first, first
            for i, other in enumerate(others):
                rng = jax.random.fold_in(jax.random.fold_in(ctx.rng, place), i)
                own, negative = own * other, negative * jax.random.permutation(rng, other)
            anchor, same = features[name], jnp.eye(len(first), dtype=bool)
            products = jnp.matmul(anchor, negative.T, precision=jax.lax.Precision.HIGHEST)
            logits = outputs["scale"] * jnp.where(same, jnp.sum(anchor * own, -1)[:, None], products)
            values.append(-jnp.mean(jnp.diag(jax.nn.log_softmax(logits))))
            accuracies.append(jnp.mean(jnp.argmax(logits, 1) == jnp.arange(len(logits))))
        return sum(values) / len(of), {"accuracy": accuracies[0], "scale": outputs["scale"]}

    return Term("symile", lambda outputs, ctx: {name: outputs[name] for name in of}, loss)
