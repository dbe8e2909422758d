"""The plain form: holds all logits, and JAX derives the gradient.

The reference for the other implementations, and the fastest for small batches.
"""

import jax
import jax.numpy as jnp

from vlm_jax.kernels.contrastive import block
from vlm_jax.kernels.contrastive.block import LOWEST, Results, Spec


def statistics(spec: Spec, x, y, scale, bias, x_labels, y_labels, x_mask, y_mask) -> tuple[Results, Results]:
    """Returns the results of rows and of columns by definition; arguments as in `contrastive.statistics`."""
    x, y = (z if mask is None else jnp.where(mask[:, None], z, 0) for z, mask in ((x, x_mask), (y, y_mask)))
    logits = scale * block.dot(x, y, (1, 1)) + (0 if bias is None else bias)
    true = lambda mask, z: jnp.ones(len(z), bool) if mask is None else mask
    rows, columns = true(x_mask, x), true(y_mask, y)
    counts = rows[:, None] & columns
    match = None if x_labels is None else counts & (x_labels[:, None] == y_labels)

    def along(axis, mask):
        zero = lambda values: jnp.where(mask, values, 0)
        out = {}
        if spec.penalty == "softmax":
            out["lse"] = zero(jax.nn.logsumexp(logits, axis, where=counts | ~jnp.expand_dims(mask, axis)))
        elif axis == 1:
            out["loss"] = jnp.sum(jax.nn.softplus(jnp.where(match, -logits, logits)), axis, where=counts)
        if spec.positives:
            out["positive_sum"] = jnp.sum(logits, axis, where=match)
            out["positive_count"] = jnp.sum(match, axis, dtype=logits.dtype)
        if spec.best:
            best = lambda where: jax.lax.stop_gradient(jnp.max(logits, axis, initial=LOWEST, where=where))
            out |= {"best_positive": best(match), "best_negative": best(counts & ~match)}
        return Results(**out)

    return along(1, rows), along(0, columns)
