"""Symile: a contrastive loss over any number of modalities."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.models.two_tower import unit
from vlm_jax.objectives.term import WHERE, Term


class Missing(nn.Module):
    """A learned unit vector in the place of what is missing."""

    @nn.compact
    def __call__(self, x, present):
        """[B, D], bool [B] -> [B, D]."""
        vector = self.param("vector", nn.initializers.normal(1.0), x.shape[-1:], x.dtype)
        return jnp.where(present[:, None], x, unit(vector))


@method(
    family="terms",
    system="Symile",
    paper="arXiv:2411.01053",
    differs="rows of three or more modalities against rows with shuffled parts, by the multilinear inner product",
    needs={"model.name": "many_tower"},
)
def symile(
    *,
    model: Any,
    of: Sequence[str] = ("image_embedding", "text_embedding", "audio_embedding"),
    negatives: str = "shuffled",
    present: Mapping[str, str] | None = None,
) -> Term:
    """Mean over anchors of -log softmax of scale x sum_d a_d b_d c_d ... (Symile, Saporta et al. 2024).

    Each modality in turn is the anchor, and is compared with tuples of the other modalities. For two modalities the
    loss is CLIP's.

    Args:
      model: linen module.
      of: outputs that are compared, [B, D] each.
      negatives: "shuffled": B tuples, of which all parts but the first are shuffled, so that a negative's parts come
        from different rows. "all": all B^(n - 1) tuples of n modalities; memory B^n.
      present: {output: key of the batch}, bool [B], False where the modality of a row is missing; a learned vector of
        the term stands in for it.

    Metrics: `accuracy`, of the first anchor, `scale`, and `share_<output>` of the rows that have it.
    """
    present = dict(present or {})
    for name in present:
        if name not in of:
            raise UserError(f"{WHERE}.present names `{name}`, which is not compared; expected some of: {', '.join(of)}")
    if negatives not in ("shuffled", "all"):
        raise UserError(f"{WHERE}.negatives is `{negatives}`; expected one of: shuffled, all")

    def features(outputs, ctx):
        found = {name: outputs[name] for name in of}
        for name, key in present.items():
            there = outputs[key].astype(bool)
            found[name] = outputs.part(f"missing_{name}", Missing(), found[name], there)
        return found

    def loss(outputs, features, rows, ctx):
        values, accuracies = [], []
        for place, name in enumerate(of):
            others = [features[other] for other in (*of[place + 1 :], *of[:place])]
            if negatives == "all":
                products, step = with_all(features[name], others)
            else:
                rng = None if ctx.rng is None else jax.random.fold_in(ctx.rng, place)
                products, step = with_shuffled(features[name], others, rng), 1
            logits, own = outputs["scale"] * products, step * jnp.arange(len(products))
            values.append(-jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), own[:, None], axis=1)))
            accuracies.append(jnp.mean(jnp.argmax(logits, 1) == own))
        shares = {f"share_{name}": jnp.mean(rows[key].astype(bool)) for name, key in present.items()}
        return sum(values) / len(of), {"accuracy": accuracies[0], "scale": outputs["scale"], **shares}

    return Term("symile", features, loss)


def with_shuffled(anchor: jax.Array, others: Sequence[jax.Array], rng: jax.Array | None) -> jax.Array:
    """Returns products [B, B] of anchors with tuples; the own tuple of row i is column i."""
    first, *rest = others
    own, negative = first, first
    for i, other in enumerate(rest):
        own, negative = own * other, negative * jax.random.permutation(jax.random.fold_in(rng, i), other)
    products = jnp.matmul(anchor, negative.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(jnp.eye(len(anchor), dtype=bool), jnp.sum(anchor * own, -1)[:, None], products)


def with_all(anchor: jax.Array, others: Sequence[jax.Array]) -> tuple[jax.Array, int]:
    """Returns products [B, B^len(others)] of anchors with all tuples, and s: row i's own tuple is column s i."""
    tuples = others[0]
    for other in others[1:]:
        tuples = (tuples[:, None] * other).reshape(-1, tuples.shape[-1])
    products = jnp.matmul(anchor, tuples.T, precision=jax.lax.Precision.HIGHEST)
    return products, sum(len(anchor) ** k for k in range(len(others)))
