"""Attention by XLA and by cuDNN: `jax.nn.dot_product_attention`."""

import jax


def xla(q, k, v, *, bias, mask, causal, scale):
    """Attention compiled by XLA (`jax.nn.dot_product_attention`); the logits [B, H, Lq, Lk] go through memory."""
    return jax.nn.dot_product_attention(q, k, v, bias, mask, scale=scale, is_causal=causal, implementation="xla")


def cudnn(q, k, v, *, bias, mask, causal, scale):
    """cuDNN's fused attention, for NVIDIA GPUs of compute capability 8.0 and up; O(L) memory."""
    return jax.nn.dot_product_attention(q, k, v, bias, mask, scale=scale, is_causal=causal, implementation="cudnn")


def cudnn_lacks(q, k, bias, mask):
    """Returns in words why cuDNN does not support these arguments; None if cuDNN supports them.

    The limits come from `jax._src.cudnn.fused_attention_stablehlo`: half precision, head_dim a multiple of 8 up to 128,
    and even lengths with a bias (a mask becomes a bias).
    """
    if q.dtype.itemsize != 2:
        return f"dtype {q.dtype} (bfloat16 or float16 only)"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"head_dim {q.shape[-1]} (a multiple of 8 up to 128 only)"
    if (bias is not None or mask is not None) and (q.shape[1] % 2 or k.shape[1] % 2):
        return f"a bias or mask with odd lengths ({q.shape[1]} queries, {k.shape[1]} keys)"
    return None
