"""Scaled dot-product attention: a plain reference, and the implementations that compete with it.

Vaswani et al. 2017, "Attention Is All You Need", equation 1: softmax(scale q k^T + bias) v, softmax in fp32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax.errors import UserError


class Choice(NamedTuple):
    """Which implementation `attention` runs for given arguments, and why."""

    implementation: str
    reason: str


def attention(q, k, v, *, bias=None, mask=None, causal=False, scale=None, implementation=None):
    """Multi-head attention.

    Args:
      q: queries [B, Lq, H, D].
      k: keys [B, Lk, H, D].
      v: values [B, Lk, H, D].
      bias: added to the scaled logits; broadcasts to [B, H, Lq, Lk].
      mask: bool, True where a query may see a key; broadcasts to [B, H, Lq, Lk]. A query that may see nothing
        attends evenly to all keys.
      causal: query i sees keys 0..i only (positions count from the start of both).
      scale: factor on q k^T; None is D ** -0.5.
      implementation: a key of `IMPLEMENTATIONS`; None chooses by platform and shape (see `explain`).

    Returns:
      [B, Lq, H, D] in q's dtype.

    Raises:
      UserError: shapes that do not agree, or an implementation that does not exist.
    """
    choice = explain(q, k, v, bias=bias, mask=mask, causal=causal, implementation=implementation)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return IMPLEMENTATIONS[choice.implementation](q, k, v, bias=bias, mask=mask, causal=causal, scale=scale)


def explain(q, k, v, *, bias=None, mask=None, causal=False, scale=None, implementation=None) -> Choice:
    """Returns the `Choice` that `attention` makes for the same arguments (arrays or `jax.ShapeDtypeStruct`s)."""
    del causal, scale
    _check(q, k, v, bias, mask)
    if implementation is None:
        return Choice("xla", "the only compiled implementation, on every platform")
    if implementation not in IMPLEMENTATIONS:
        raise UserError(
            f"attention implementation is `{implementation}`; expected one of: {', '.join(IMPLEMENTATIONS)}"
        )
    return Choice(implementation, "asked for by name")


def reference(q, k, v, *, bias, mask, causal, scale):
    """The equation, line by line; logits and softmax in fp32."""
    logits = scale * jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias
    hidden = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite: a row without any visible key stays finite
    if mask is not None:
        logits = jnp.where(mask, logits, hidden)
    if causal:
        seen = jnp.arange(q.shape[1])[:, None] >= jnp.arange(k.shape[1])[None, :]
        logits = jnp.where(seen, logits, hidden)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).astype(q.dtype)


def xla(q, k, v, *, bias, mask, causal, scale):
    """`jax.nn.dot_product_attention` as XLA compiles it: the logits [B, H, Lq, Lk] go through memory."""
    return jax.nn.dot_product_attention(
        q, k, v, bias, mask, scale=scale, is_causal=causal, implementation="xla"
    )  # fmt: skip


IMPLEMENTATIONS = {"reference": reference, "xla": xla}


def _check(q, k, v, bias, mask):
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if not (q.ndim == k.ndim == v.ndim == 4):
        raise UserError(f"attention wants [batch, length, heads, head_dim]; got {shapes}")
    if k.shape != v.shape or q.shape[:1] + q.shape[2:] != k.shape[:1] + k.shape[2:]:
        raise UserError(
            f"attention wants q, k, v of one batch, heads and head_dim, k and v of one length; got {shapes}"
        )
    logits = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    for name, array in (("bias", bias), ("mask", mask)):
        if array is not None and (
            array.ndim != 4 or any(n not in (1, want) for n, want in zip(array.shape, logits, strict=True))
        ):
            raise UserError(f"attention {name} must broadcast to [B, H, Lq, Lk] = {logits}; got {array.shape}")
    if mask is not None and mask.dtype != jnp.bool_:
        raise UserError(f"attention mask must be bool (True = visible); got {mask.dtype}")
