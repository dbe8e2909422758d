"""Attention on an NVIDIA GPU: Pallas (Triton) kernels, forward and backward.

Dao et al. 2022, "FlashAttention", algorithms 1 and 4, on [B, L, H, D] without transposes. A program is (example, head,
block of queries) and passes over blocks of keys with an online softmax. In the backward pass, dK and dV have a program
for each block of keys, dQ for each block of queries, and dbias for each block of logits; a dbias program sums over the
examples and heads that share the bias. No array of size [B, H, Lq, Lk] is written, and no atomics are needed. Triton
requires powers of two: masked loads pad head_dim and lengths in registers, never in memory.

The tests interpret the kernels and lower them for CUDA. No GPU has timed the kernels, so `attention` never chooses them
by default. JAX deprecates Pallas's Triton backend from 0.12 on, in favour of Mosaic GPU.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from vlm_jax.kernels.attention.reference import HIDDEN

SEES_NOTHING = 1e30  # replaces the log-sum-exp of a row without visible keys, as in `tpu_short`


class Static(NamedTuple):
    """Arguments that are fixed when attention is traced."""

    causal: bool
    scale: float
    interpret: bool
    queries: int = 64  # queries of a block, a power of two
    keys: int = 64


def lacks(q, k, bias, mask):
    """Returns in words why the kernels do not support these arguments; None if they do."""
    del bias, mask
    if q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"dtype {q.dtype} (float32, bfloat16 and float16 only)"
    if q.dtype != k.dtype:
        return f"queries of {q.dtype} with keys of {k.dtype}"
    if q.shape[3] > 256:
        return f"head_dim {q.shape[3]} (256 at most)"
    return None


def gpu(q, k, v, *, bias, mask, causal, scale, interpret=False):
    """Attention by the Triton kernels; arguments as in `kernels.attention`."""
    if isinstance(scale, jax.Array):  # traced, but the kernels need a number
        q, scale = (q * scale).astype(q.dtype), 1.0
    whole = lambda x: jnp.broadcast_to(x, (*x.shape[:2], q.shape[1], k.shape[1]))
    bias = None if bias is None else whole(bias.astype(jnp.float32))
    mask = None if mask is None else whole(mask).astype(jnp.int8)
    return _attend(Static(causal, float(scale), interpret), q, k, v, bias, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, q, k, v, bias, mask):
    return _forward(static, q, k, v, bias, mask, q.dtype)[0]


def _attend_forward(static, q, k, v, bias, mask):
    out, lse = _forward(static, q, k, v, bias, mask, jnp.float32)  # unrounded, for the digits of `delta`
    return out.astype(q.dtype), (q, k, v, bias, mask, out, lse)


def _attend_backward(static, saved, dout):
    q, k, v, bias, mask, out, lse = saved
    delta = jnp.einsum("bqhd,bqhd->bhq", dout.astype(jnp.float32), out)
    arrays = (q, k, v, dout.astype(q.dtype), lse, delta, bias, mask)
    dq = _run(static, "query", _dq_kernel, "attention_gpu_dq", arrays, [(q.shape, q.dtype)])[0]
    shapes = [(k.shape, k.dtype), (v.shape, v.dtype)]
    dk, dv = _run(static, "key", _dkv_kernel, "attention_gpu_dkv", arrays, shapes)
    dbias = None if bias is None else _dbias(static, arrays)
    return dq, dk, dv, dbias, None


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(static, q, k, v, bias, mask, dtype):
    rows = (q.shape[0], q.shape[2], q.shape[1])
    results = [(q.shape, dtype), (rows, jnp.float32)]
    return _run(static, "query", _forward_kernel, "attention_gpu_forward", (q, k, v, bias, mask), results)


def _power_of_two(n):
    return max(16, pl.next_power_of_2(n))


def _blocks(static, lq, lk):
    return min(static.queries, _power_of_two(lq)), min(static.keys, _power_of_two(lk))


def _rows(array, by, size, dim):
    """Returns the block of [B, L, H, D] for one example and head: all rows, or (by block) `size` rows."""
    length = pl.cdiv(array.shape[1], size) * size
    if by:
        return pl.BlockSpec((None, size, None, dim), lambda b, h, i: (b, i, h, 0))
    return pl.BlockSpec((None, length, None, dim), lambda b, h, i: (b, 0, h, 0))


def _run(static, by, kernel, name, arrays, results):
    """Runs a kernel over (example, head, block of queries or of keys)."""
    q, k = arrays[:2]
    batch, lq, heads, dim = q.shape
    lk, dim = k.shape[1], _power_of_two(dim)
    bq, bk = _blocks(static, lq, lk)
    whole = (pl.cdiv(lq, bq) * bq, pl.cdiv(lk, bk) * bk)

    def spec(array, of):
        if of == "row":  # [B, H, Lq]
            if by == "query":
                return pl.BlockSpec((None, None, bq), lambda b, h, i: (b, h, i))
            return pl.BlockSpec((None, None, whole[0]), lambda b, h, i: (b, h, 0))
        if of == "logits":  # [1 | B, 1 | H, Lq, Lk]
            one, same = array.shape[0] == 1, array.shape[1] == 1
            place = lambda b, h: (0 if one else b, 0 if same else h)
            if by == "query":
                return pl.BlockSpec((None, None, bq, whole[1]), lambda b, h, i: (*place(b, h), i, 0))
            return pl.BlockSpec((None, None, whole[0], bk), lambda b, h, i: (*place(b, h), 0, i))
        return _rows(array, by == of, bq if of == "query" else bk, dim)

    kinds = ["query", "key", "key", *(["query", "row", "row"] if len(arrays) > 5 else []), "logits", "logits"]
    there = [(x, of) for x, of in zip(arrays, kinds, strict=True) if x is not None]
    outputs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in results]
    out_kinds = ["key", "key"] if by == "key" else ["query", "row"][: len(results)]
    size = dict(lq=lq, lk=lk, dim=q.shape[3], bq=bq, bk=bk)
    flags = dict(has_bias=arrays[-2] is not None, has_mask=arrays[-1] is not None)
    return pl.pallas_call(
        functools.partial(kernel, static=static, **size, **flags),
        name=name,
        grid=(batch, heads, pl.cdiv(*((lq, bq) if by == "query" else (lk, bk)))),
        in_specs=[spec(x, of) for x, of in there],
        out_specs=[spec(x, of) for x, of in zip(outputs, out_kinds, strict=True)],
        out_shape=outputs,
        interpret=static.interpret,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
    )(*(x for x, _ in there))


def _load(ref, first, count, length, dim):
    """Returns the row numbers first .. first + count - 1 and the mask of valid entries, [count, power of two] each."""
    row = first + jax.lax.broadcasted_iota(jnp.int32, (count, ref.shape[-1]), 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, (count, ref.shape[-1]), 1)
    return row, (row < length) & (lane < dim)


def _rows_of(ref, start, count, first, length, dim):
    """Loads `count` rows of a ref from `start`; row 0 of the ref is row `first - start` of the head."""
    _, there = _load(ref, first, count, length, dim)
    return plgpu.load(ref.at[pl.ds(start, count), :], mask=there, other=0.0)


def _dot(a, b, transpose=(False, False)):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((0 if transpose[0] else 1,), (1 if transpose[1] else 0,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _logits(static, q, k, bias, mask, query, key, lk):
    """Returns logits [queries, keys] in fp32: HIDDEN for hidden keys, -inf for keys beyond the last."""
    logits = _dot(q, k, (False, True)) * static.scale
    if bias is not None:
        logits = logits + bias
    seen = None if mask is None else mask != 0
    if static.causal:
        seen = key <= query if seen is None else seen & (key <= query)
    if seen is not None:
        logits = jnp.where(seen, logits, HIDDEN)
    return jnp.where(key < lk, logits, -jnp.inf)


def _numbers(bq, bk, first_query, first_key):
    query = first_query + jax.lax.broadcasted_iota(jnp.int32, (bq, bk), 0)
    return query, first_key + jax.lax.broadcasted_iota(jnp.int32, (bq, bk), 1)


def _extra(ref, rows, columns, there):
    return None if ref is None else plgpu.load(ref.at[rows, columns], mask=there, other=0)


def _forward_kernel(q_ref, k_ref, v_ref, *refs, static, lq, lk, dim, bq, bk, has_bias, has_mask):
    *extras, out_ref, lse_ref = refs
    bias_ref = extras.pop(0) if has_bias else None
    mask_ref = extras.pop(0) if has_mask else None
    first_query = pl.program_id(2) * bq
    q = _rows_of(q_ref, 0, bq, first_query, lq, dim)

    def body(j, carry):
        top, total, out = carry
        query, key = _numbers(bq, bk, first_query, j * bk)
        there, columns = (query < lq) & (key < lk), pl.ds(j * bk, bk)
        k, v = (_rows_of(ref, j * bk, bk, j * bk, lk, dim) for ref in (k_ref, v_ref))
        bias, mask = (_extra(ref, slice(None), columns, there) for ref in (bias_ref, mask_ref))
        logits = _logits(static, q, k, bias, mask, query, key, lk)
        new = jnp.maximum(top, jnp.max(logits, axis=1))
        weights = jnp.exp(logits - new[:, None])
        shrink = jnp.exp(top - new)
        out = out * shrink[:, None] + _dot(weights.astype(v.dtype), v)
        return new, total * shrink + jnp.sum(weights, axis=1), out

    lowest = float(jnp.finfo(jnp.float32).min)
    start = (jnp.full((bq,), lowest), jnp.zeros((bq,)), jnp.zeros((bq, q.shape[1]), jnp.float32))
    top, total, out = jax.lax.fori_loop(0, _key_blocks(static, first_query, lk, bq, bk, has_mask), body, start)
    _, there = _load(out_ref, first_query, bq, lq, dim)
    plgpu.store(out_ref, (out / total[:, None]).astype(out_ref.dtype), mask=there)
    lse = jnp.where(top > 0.5 * HIDDEN, top + jnp.log(total), SEES_NOTHING)
    plgpu.store(lse_ref, lse, mask=first_query + jnp.arange(bq) < lq)


def _key_blocks(static, first_query, lk, bq, bk, has_mask):
    """Returns the number of key blocks before the causal future; all blocks without causality or with a mask."""
    blocks = pl.cdiv(lk, bk)
    if static.causal and not has_mask:
        return jnp.minimum(blocks, jax.lax.div(first_query + bq + bk - 1, bk))
    return blocks


def _block_gradient(static, q, k, v, dout, lse, delta, bias, mask, query, key, lk, has_mask):
    """Returns (weights for dV, gradient of the logits), [queries, keys] in fp32."""
    logits = _logits(static, q, k, bias, mask, query, key, lk)
    weights = jnp.exp(logits - lse[:, None])
    dlogits = weights * (_dot(dout, v, (False, True)) - delta[:, None])
    if has_mask:  # a row without visible keys: weights 1 / Lk for dV, 0 for all else
        even = jnp.where(lse > 0.5 * SEES_NOTHING, 1.0 / lk, 0.0)
        weights = weights + jnp.where(key < lk, even[:, None], 0.0)
    return weights, dlogits


def _take(refs, has_bias, has_mask):
    refs = list(refs)
    bias = refs.pop(0) if has_bias else None
    mask = refs.pop(0) if has_mask else None
    return bias, mask, refs


def _dq_kernel(
    q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, *refs, static, lq, lk, dim, bq, bk, has_bias, has_mask
):
    bias_ref, mask_ref, (dq_ref,) = _take(refs, has_bias, has_mask)
    first_query = pl.program_id(2) * bq
    q, dout = (_rows_of(ref, 0, bq, first_query, lq, dim) for ref in (q_ref, dout_ref))
    there_row = first_query + jnp.arange(bq) < lq
    lse, delta = (plgpu.load(ref, mask=there_row, other=0.0) for ref in (lse_ref, delta_ref))

    def body(j, dq):
        query, key = _numbers(bq, bk, first_query, j * bk)
        there, columns = (query < lq) & (key < lk), pl.ds(j * bk, bk)
        k, v = (_rows_of(ref, j * bk, bk, j * bk, lk, dim) for ref in (k_ref, v_ref))
        bias, mask = (_extra(ref, slice(None), columns, there) for ref in (bias_ref, mask_ref))
        _, dlogits = _block_gradient(static, q, k, v, dout, lse, delta, bias, mask, query, key, lk, has_mask)
        return dq + _dot(dlogits.astype(k.dtype), k)

    blocks = _key_blocks(static, first_query, lk, bq, bk, has_mask)
    dq = jax.lax.fori_loop(0, blocks, body, jnp.zeros((bq, q.shape[1]), jnp.float32))
    _, there = _load(dq_ref, first_query, bq, lq, dim)
    plgpu.store(dq_ref, (dq * static.scale).astype(dq_ref.dtype), mask=there)


def _dkv_kernel(
    q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, *refs, static, lq, lk, dim, bq, bk, has_bias, has_mask
):
    bias_ref, mask_ref, (dk_ref, dv_ref) = _take(refs, has_bias, has_mask)
    first_key = pl.program_id(2) * bk
    k, v = (_rows_of(ref, 0, bk, first_key, lk, dim) for ref in (k_ref, v_ref))

    def body(i, carry):
        dk, dv = carry
        query, key = _numbers(bq, bk, i * bq, first_key)
        there, rows = (query < lq) & (key < lk), pl.ds(i * bq, bq)
        q, dout = (_rows_of(ref, i * bq, bq, i * bq, lq, dim) for ref in (q_ref, dout_ref))
        there_row = i * bq + jnp.arange(bq) < lq
        lse, delta = (plgpu.load(ref.at[rows], mask=there_row, other=0.0) for ref in (lse_ref, delta_ref))
        bias, mask = (_extra(ref, rows, slice(None), there) for ref in (bias_ref, mask_ref))
        weights, dlogits = _block_gradient(static, q, k, v, dout, lse, delta, bias, mask, query, key, lk, has_mask)
        weights, dlogits = (jnp.where(query < lq, x, 0.0).astype(q.dtype) for x in (weights, dlogits))
        return dk + _dot(dlogits, q, (True, False)), dv + _dot(weights, dout, (True, False))

    zero = jnp.zeros((bk, k.shape[1]), jnp.float32)
    start = jax.lax.div(first_key, bq) if static.causal and not has_mask else 0
    dk, dv = jax.lax.fori_loop(start, pl.cdiv(lq, bq), body, (zero, zero))
    _, there = _load(dk_ref, first_key, bk, lk, dim)
    plgpu.store(dk_ref, (dk * static.scale).astype(dk_ref.dtype), mask=there)
    plgpu.store(dv_ref, dv.astype(dv_ref.dtype), mask=there)


def _dbias(static, arrays):
    """Returns dbias [1 | B, 1 | H, Lq, Lk]; a program sums one block over examples and heads that share the bias."""
    q, k, _, _, _, _, bias, mask = arrays
    batch, lq, heads, dim = q.shape
    lk, dim = k.shape[1], _power_of_two(dim)
    bq, bk = _blocks(static, lq, lk)
    over = batch if bias.shape[0] == 1 else 1, heads if bias.shape[1] == 1 else 1

    def kernel(q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, *refs):
        bias_ref, mask_ref, (dbias_ref,) = _take(refs, True, mask is not None)
        first_query, first_key = pl.program_id(2) * bq, pl.program_id(3) * bk
        example, head = pl.program_id(0), pl.program_id(1)
        query, key = _numbers(bq, bk, first_query, first_key)
        there, row = (query < lq) & (key < lk), first_query + jnp.arange(bq) < lq
        bias = plgpu.load(bias_ref, mask=there, other=0.0)

        def body(n, total):
            b, h = jax.lax.div(n, over[1]), jax.lax.rem(n, over[1])
            b, h = (b if over[0] > 1 else example), (h if over[1] > 1 else head)

            def rows(ref, first, count, length):
                _, inside = _load(ref, first, count, length, q.shape[3])
                return plgpu.load(ref.at[b, pl.ds(first, count), h, :], mask=inside, other=0.0)

            own_q, own_dout = rows(q_ref, first_query, bq, lq), rows(dout_ref, first_query, bq, lq)
            own_k, own_v = rows(k_ref, first_key, bk, lk), rows(v_ref, first_key, bk, lk)
            queries = pl.ds(first_query, bq)
            lse, delta = (plgpu.load(ref.at[b, h, queries], mask=row, other=0.0) for ref in (lse_ref, delta_ref))
            seen = None
            if mask is not None:
                place = b if mask.shape[0] > 1 else b * 0, h if mask.shape[1] > 1 else h * 0
                seen = plgpu.load(mask_ref.at[*place, queries, pl.ds(first_key, bk)], mask=there, other=0)
            _, dlogits = _block_gradient(
                static, own_q, own_k, own_v, own_dout, lse, delta, bias, seen, query, key, lk, False
            )  # fmt: skip
            return total + dlogits

        total = jax.lax.fori_loop(0, over[0] * over[1], body, jnp.zeros((bq, bk), jnp.float32))
        plgpu.store(dbias_ref, total, mask=there)

    whole = (pl.cdiv(lq, bq) * bq, pl.cdiv(lk, bk) * bk)
    row = pl.BlockSpec((batch, heads, whole[0]))
    block = pl.BlockSpec((None, None, bq, bk), lambda b, h, i, j: (b, h, i, j))
    zeros = lambda n: lambda *_: (0,) * n
    at_zero = lambda spec: pl.BlockSpec(spec.block_shape, zeros(len(spec.block_shape)))
    specs = [
        at_zero(_all(q, bq, dim)),
        *[at_zero(_all(k, bk, dim))] * 2,
        at_zero(_all(q, bq, dim)),
        at_zero(row),
        at_zero(row),
    ]
    specs += [block] + ([] if mask is None else [at_zero(pl.BlockSpec((*mask.shape[:2], *whole)))])
    return pl.pallas_call(
        kernel,
        name="attention_gpu_dbias",
        grid=(*bias.shape[:2], pl.cdiv(lq, bq), pl.cdiv(lk, bk)),
        in_specs=specs,
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(bias.shape, jnp.float32),
        interpret=static.interpret,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
    )(*(x for x in arrays if x is not None))


def _all(x, size, dim):
    return pl.BlockSpec((x.shape[0], pl.cdiv(x.shape[1], size) * size, x.shape[2], dim))
