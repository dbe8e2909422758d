"""Attention on a TPU for long sequences: softmax in one pass over blocks of keys, forward and backward.

Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", and Dao et al. 2022, "FlashAttention",
algorithms 1 and 4, with the logits transposed as in `tpu_short`: S^T = K Q^T, keys along sublanes.

Memory order: a grid step is (example, lane tile, block of queries). All keys and values of the lane tile's heads stay
on chip while the blocks of queries pass; dK and dV accumulate on chip in fp32. The backward pass is one pass: S and
dO V^T are computed once for dq, dk and dv.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vlm_jax.kernels.attention.reference import HIDDEN
from vlm_jax.kernels.attention.tpu_heads import LANES
from vlm_jax.kernels.attention.tpu_short import LOG2E, NN, NT, SEES_NOTHING, VMEM_LIMIT, dot, key_column, like

LOWEST = float(jnp.finfo(jnp.float32).min)  # below HIDDEN, and finite


class Spec(NamedTuple):
    """Static parameters of a kernel, besides the shapes of its operands."""

    heads: int
    head_dim: int  # divides 128 or is a multiple of it; heads * head_dim is a whole number of lane tiles
    causal: bool
    scale: float
    length: int  # number of keys without padding
    queries: int = 1024  # queries of a grid step; divides Lq
    keys: int = 512  # keys of a block; divides Lk
    unroll: int = 4  # blocks unrolled at a time, so that the compiler overlaps them
    interpret: bool = False

    @property
    def lanes(self):
        return max(LANES, self.head_dim)

    @property
    def group_heads(self):
        return max(1, LANES // self.head_dim)


def _visible(spec, keys_ref, first_key, first_query, shape):
    """Returns (key numbers, bool [keys, queries] of visible pairs, or None if every key of the block is visible)."""
    seen = None
    key = jax.lax.broadcasted_iota(jnp.int32, shape, 0) + first_key
    if keys_ref is not None:
        seen = jnp.broadcast_to(key_column(keys_ref.at[:, :, :, pl.ds(first_key, shape[0])], 0, 0) > 0.5, shape)
    if spec.causal:
        query = jax.lax.broadcasted_iota(jnp.int32, shape, 1) + first_query
        seen = key <= query if seen is None else (key <= query) & seen
    return key, seen


def _hide(spec, logits, keys_ref, first_key, first_query, lk):
    """Sets logits of hidden keys to HIDDEN, of padding to -inf: exp(-inf) is 0 even if every key is hidden."""
    if keys_ref is None and not spec.causal and spec.length == lk:
        return logits
    key, seen = _visible(spec, keys_ref, first_key, first_query, logits.shape)
    if seen is not None:
        logits = jnp.where(seen, logits, HIDDEN)
    return logits if spec.length == lk else jnp.where(key < spec.length, logits, -jnp.inf)


def _head_lanes(spec, x, h):
    """Returns x [L, lanes] with zeros in the lanes of every head of the tile but h."""
    if spec.group_heads == 1:
        return x
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, x.shape[1]), 1)
    return jnp.where((lane >= h * spec.head_dim) & (lane < (h + 1) * spec.head_dim), x, jnp.zeros_like(x))


def _loop(spec, lk, first_query, has_keys, body, carry):
    """Runs body(first key, carry) over the blocks of keys, without blocks wholly in the causal future.

    With a mask all blocks run: a query without any visible key attends evenly to all keys, the future included.
    """
    blocks = lk // spec.keys
    unroll = min(spec.unroll, blocks)
    while blocks % unroll:
        unroll -= 1
    chunks = blocks // unroll
    if spec.causal and not has_keys:
        chunks = jnp.minimum(chunks, (first_query + spec.queries + unroll * spec.keys - 1) // (unroll * spec.keys))

    def chunk(c, carry):
        for i in range(unroll):
            carry = body(pl.multiple_of((c * unroll + i) * spec.keys, spec.keys), carry)
        return carry

    if isinstance(chunks, int) and chunks == 1:
        for i in range(unroll):
            carry = body(i * spec.keys, carry)
        return carry
    return jax.lax.fori_loop(0, chunks, chunk, carry)


def _forward(q_ref, k_ref, v_ref, *refs, spec, has_keys):
    keys_ref = refs[0] if has_keys else None
    out_ref, lse_ref = refs[-2:]
    lk, dim = k_ref.shape[1], spec.head_dim
    first_query = pl.program_id(2) * spec.queries
    q = q_ref[0]
    outs = []
    for h in range(spec.group_heads):

        def body(first, carry, h=h):
            top, total, out = carry
            rows = pl.ds(first, spec.keys)
            logits = dot(_head_lanes(spec, k_ref[0, rows], h), q, NT) * spec.scale
            logits = _hide(spec, logits, keys_ref, first, first_query, lk)
            new = jnp.maximum(top, jnp.max(logits, axis=0, keepdims=True))
            weights = jnp.exp2((logits - new) * LOG2E)
            shrink = jnp.exp2((top - new) * LOG2E)
            value = v_ref[0, rows].T[h * dim : (h + 1) * dim]
            out = out * shrink + dot(value, weights.astype(v_ref.dtype), NN)
            return new, total * shrink + jnp.sum(weights, axis=0, keepdims=True), out

        start = (
            jnp.full((1, spec.queries), LOWEST, jnp.float32),
            jnp.zeros((1, spec.queries), jnp.float32),
            jnp.zeros((dim, spec.queries), jnp.float32),
        )
        top, total, out = _loop(spec, lk, first_query, has_keys, body, start)
        outs.append(out * (1.0 / total))
        lse = top + jnp.log(total)
        if has_keys:
            lse = jnp.where(top > 0.5 * HIDDEN, lse, SEES_NOTHING)
        lse_ref[0, 0, h : h + 1, :] = lse
    out = jnp.concatenate(outs, 0) if len(outs) > 1 else outs[0]
    out_ref[0] = out.T.astype(out_ref.dtype)


def _backward(q_ref, k_ref, v_ref, *refs, spec, has_keys):
    keys_ref = refs[0] if has_keys else None
    dout_ref, lse_ref, delta_ref, dq_ref, dk_ref, dv_ref, dk_sum, dv_sum = refs[has_keys:]
    lk, dim = k_ref.shape[1], spec.head_dim
    first_query = pl.program_id(2) * spec.queries

    @pl.when(pl.program_id(2) == 0)
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    q, dout, dqs = q_ref[0], dout_ref[0], []
    for h in range(spec.group_heads):
        lse, delta = lse_ref[0, 0, h : h + 1, :], delta_ref[0, 0, h : h + 1, :]
        own_q, own_dout = _head_lanes(spec, q, h), _head_lanes(spec, dout, h)

        def body(first, dq, h=h, lse=lse, delta=delta, own_q=own_q, own_dout=own_dout):
            rows = pl.ds(first, spec.keys)
            k, v = k_ref[0, rows], v_ref[0, rows]
            logits = dot(k, own_q, NT) * spec.scale
            logits = _hide(spec, logits, keys_ref, first, first_query, lk)
            weights = jnp.exp2((logits - lse) * LOG2E)
            dlogits = weights * (dot(v, own_dout, NT) - delta)
            if has_keys:
                key = jax.lax.broadcasted_iota(jnp.int32, weights.shape, 0) + first
                even = jnp.where(lse > 0.5 * SEES_NOTHING, 1.0 / spec.length, 0.0)
                weights = weights + jnp.where(key < spec.length, even, 0.0)
            dlogits, weights = dlogits.astype(k.dtype), weights.astype(k.dtype)
            dv_sum[rows] = dv_sum[rows] + dot(weights, own_dout, NN)
            dk_sum[rows] = dk_sum[rows] + dot(dlogits, own_q, NN)
            return dq + dot(k.T[h * dim : (h + 1) * dim], dlogits, NN)

        dq = jnp.zeros((dim, spec.queries), jnp.float32)
        dqs.append(_loop(spec, lk, first_query, has_keys, body, dq))
    dq = jnp.concatenate(dqs, 0) if len(dqs) > 1 else dqs[0]
    dq_ref[0] = (dq * spec.scale).T.astype(dq_ref.dtype)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        dk_ref[0] = (dk_sum[...] * spec.scale).astype(dk_ref.dtype)
        dv_ref[0] = dv_sum[...].astype(dv_ref.dtype)


def _call(kernel, name, spec, arrays, results, scratch=()):
    batch, lq, width = arrays[0].shape
    tiles = width // spec.lanes
    per_query = pl.BlockSpec((1, spec.queries, spec.lanes), lambda b, g, i: (b, i, g))
    row = pl.BlockSpec((1, 1, spec.group_heads, spec.queries), lambda b, g, i: (b, g, 0, i))

    def block(x):
        if x.ndim == 3 and x.shape[1] == lq and x is not arrays[1] and x is not arrays[2]:
            return per_query
        if x.ndim == 3:
            return pl.BlockSpec((1, x.shape[1], spec.lanes), lambda b, g, i: (b, 0, g))
        if x is keys:
            one = x.shape[0] == 1
            return pl.BlockSpec((1, 1, 1, x.shape[3]), lambda b, g, i: (0 if one else b, 0, 0, 0))
        return row

    keys = arrays[3] if len(arrays) in (4, 7) else None
    return pl.pallas_call(
        kernel,
        name=name,
        grid=(batch, tiles, lq // spec.queries),
        in_specs=[block(x) for x in arrays],
        out_specs=[{"query": per_query, "row": row}.get(kind) or block(arrays[1]) for kind, _ in results],
        out_shape=[x for _, x in results],
        scratch_shapes=scratch,
        interpret=spec.interpret,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
    )(*arrays)


def forward(q, k, v, keys, *, spec):
    """Returns out [B, Lq, H * D] and the logits' log-sum-exp [B, H, Lq]; operands as in `tpu_short.forward`."""
    rows = (q.shape[0], spec.heads // spec.group_heads, spec.group_heads, q.shape[1])
    arrays = [q, k, v] + ([] if keys is None else [keys])
    results = [("query", like(q, q.shape, q.dtype)), ("row", like(q, rows, jnp.float32))]
    kernel = functools.partial(_forward, spec=spec, has_keys=keys is not None)
    out, lse = _call(kernel, "attention_long_forward", spec, arrays, results)
    return out, lse.reshape(q.shape[0], spec.heads, q.shape[1])


def backward(q, k, v, keys, dout, lse, delta, *, spec):
    """Returns dq, dk, dv; delta [B, H, Lq] is the sum of dout * out over a head's lanes (fp32)."""
    rows = (q.shape[0], spec.heads // spec.group_heads, spec.group_heads, q.shape[1])
    arrays = [q, k, v] + ([] if keys is None else [keys]) + [dout, lse.reshape(rows), delta.reshape(rows)]
    results = [("query", like(q, q.shape, q.dtype))] + [("key", like(q, k.shape, k.dtype))] * 2
    scratch = [pltpu.VMEM((k.shape[1], spec.lanes), jnp.float32)] * 2
    kernel = functools.partial(_backward, spec=spec, has_keys=keys is not None)
    return _call(kernel, "attention_long_backward", spec, arrays, results, scratch)
