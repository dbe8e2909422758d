"""The equation of attention, line by line: the reference for every other implementation."""

import jax
import jax.numpy as jnp

HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)
"""The logit of a key that a query may not see. The value is finite, so that a row without visible keys stays finite:
the weights are exp(HIDDEN - HIDDEN) / Lk = 1 / Lk for any bias, and the row's query, keys and bias get no gradient."""


def reference(q, k, v, *, bias, mask, causal, scale):
    """softmax(scale q k^T + bias) v (Vaswani et al. 2017, equation 1); logits and softmax at least in fp32.

    Memory: the logits, the weights and the mask, [B, H, Lq, Lk] each.
    """
    logits = scale * jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.promote_types(q.dtype, jnp.float32))
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = jnp.where(mask, logits, HIDDEN)
    if causal:
        seen = jnp.arange(q.shape[1])[:, None] >= jnp.arange(k.shape[1])[None, :]
        logits = jnp.where(seen, logits, HIDDEN)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).astype(q.dtype)
