"""The kernels whose schedules are compared: ours and JAX's, at the shapes of vision-language towers.

Each function returns {name: (fn, args)} for `tpu_cycles.py`. Batch 8, bf16.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, SegmentIds, flash_attention

from vlm_jax.kernels.attention import tpu

SHAPES = {
    # name: (queries, keys, heads, head_dim, causal)
    "ViT-B/16 196": (196, 196, 12, 64, False),
    "ViT-B/16 197": (197, 197, 12, 64, False),
    "ViT-L/14 257": (257, 257, 16, 64, False),
    "So400m/14 729": (729, 729, 16, 72, False),
    "text 64": (64, 64, 8, 64, True),
    "text 77": (77, 77, 8, 64, True),
    "CapPa cross 64 x 196": (64, 196, 12, 64, False),
    "long 2048": (2048, 2048, 8, 128, False),
}
BATCH = 8


def _array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def _static(causal, dim):
    return tpu.Static(causal, dim**-0.5, False)


def ours_forward():
    """The forward kernel without gradients, on packed arrays [B, L, H * D]."""
    cases = {}
    for name, (lq, lk, heads, dim, causal) in SHAPES.items():
        call = tpu.Call("forward", _static(causal, dim), heads, False, lq > 1024, (True,) * 3 + (False,) * 3)
        width = heads * dim
        cases[name] = call_local(call), (_array(BATCH, lq, width), *[_array(BATCH, lk, width)] * 2)
    return cases


def ours_forward_backward():
    """The forward kernel with log-sum-exp and the backward kernel, in one program."""
    cases = {}
    for name, (lq, lk, heads, dim, causal) in SHAPES.items():
        static, width, long = _static(causal, dim), heads * dim, lq > 1024
        first = tpu.Call("forward", static, heads, True, long, (True,) * 3 + (False,) * 3)
        second = tpu.Call("backward", static, heads, True, long, (True,) * 3 + (False,) * 3 + (long, True, True))
        cases[name] = both(first, second, long), (
            _array(BATCH, lq, width), *[_array(BATCH, lk, width)] * 2, _array(BATCH, lq, width),
        )  # fmt: skip
    return cases


def call_local(call):
    return lambda *arrays: tpu.local(call, *arrays)


def both(first, second, long):
    def run(q, k, v, dout):
        out, lse = tpu.local(first, q, k, v)
        return out, tpu.local(second, q, k, v, *([out] if long else []), dout, lse)

    return run


def _flash(lq, lk, dim, causal, block=None):
    """One block per head, or blocks of `block` rows for long lengths; segment ids mark the padding to 128."""
    pad_q, pad_k = -(-lq // 128) * 128, -(-lk // 128) * 128
    bq, bk = (block, block) if block else (pad_q, pad_k)
    sizes = BlockSizes(
        block_q=bq, block_k_major=bk, block_k=bk, block_b=1, block_q_major_dkv=bq, block_k_major_dkv=bk,
        block_k_dkv=bk, block_q_dkv=bq, block_k_major_dq=bk, block_k_dq=bk, block_q_dq=bq,
    )  # fmt: skip

    def run(q, k, v):
        ids = None
        if (pad_q, pad_k) != (lq, lk):
            number = lambda padded, length: jnp.broadcast_to(jnp.arange(padded) >= length, (BATCH, padded)) * 1
            ids = SegmentIds(number(pad_q, lq), number(pad_k, lk))
        return flash_attention(q, k, v, segment_ids=ids, causal=causal, sm_scale=dim**-0.5, block_sizes=sizes)

    return run, pad_q, pad_k


def flash_forward():
    """`jax.experimental.pallas.ops.tpu.flash_attention`, forward."""
    cases = {}
    for name, (lq, lk, heads, dim, causal) in SHAPES.items():
        run, q, k = _flash(lq, lk, dim, causal, 1024 if lq > 1024 else None)
        cases[name] = run, (_array(BATCH, heads, q, dim), *[_array(BATCH, heads, k, dim)] * 2)
    return cases


def flash_forward_backward():
    """`flash_attention`, forward, and its two backward kernels."""
    cases = {}
    for name, (lq, lk, heads, dim, causal) in SHAPES.items():
        run, q, k = _flash(lq, lk, dim, causal, 1024 if lq > 1024 else None)

        def grads(q, k, v, dout, run=run):
            out, pull = jax.vjp(run, q, k, v)
            return out, pull(dout)

        query, key = _array(BATCH, heads, q, dim), _array(BATCH, heads, k, dim)
        cases[name] = grads, (query, key, key, query)
    return cases


def splash_forward():
    """`splash_attention` (jax.experimental), forward; lengths and head_dims are rounded up to multiples of 128."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    cases = {}
    for name, (lq, lk, heads, dim, causal) in SHAPES.items():
        q, k, d = -(-lq // 128) * 128, -(-lk // 128) * 128, -(-dim // 128) * 128
        mask = splash.CausalMask((q, k)) if causal else splash.FullMask((q, k))

        def run(q, k, v, ids, mask=mask, heads=heads):
            block = lambda n: min(n, 1024)
            sizes = splash.BlockSizes(
                block_q=block(q.shape[2]), block_kv=block(k.shape[2]), block_kv_compute=block(k.shape[2])
            )
            kernel = splash.make_splash_mha_single_device(splash.MultiHeadMask([mask] * heads), block_sizes=sizes)
            return jax.vmap(lambda q, k, v: kernel(q, k, v))(q, k, v) if ids is None else None

        query, key = _array(BATCH, heads, q, d), _array(BATCH, heads, k, d)
        cases[name] = (lambda q, k, v, run=run: run(q, k, v, None)), (query, key, key)
    return cases
