"""Scaled dot-product attention: one function, a plain reference, and several implementations.

Vaswani et al. 2017, "Attention Is All You Need", equation 1: softmax(scale q k^T + bias) v, softmax in fp32.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax.errors import UserError
from vlm_jax.kernels.attention import gpu as _gpu
from vlm_jax.kernels.attention import tpu as _tpu
from vlm_jax.kernels.attention.reference import reference
from vlm_jax.kernels.attention.xla import cudnn, cudnn_lacks, xla

__all__ = ["IMPLEMENTATIONS", "Choice", "attention", "explain"]

IMPLEMENTATIONS = {
    "reference": reference,
    "xla": xla,
    "cudnn": cudnn,
    "tpu": _tpu.tpu,
    "tpu_interpret": functools.partial(_tpu.tpu, interpret=True),
    "gpu": _gpu.gpu,
    "gpu_interpret": functools.partial(_gpu.gpu, interpret=True),
}
"""Name -> function. `*_interpret` runs the same kernel in Pallas's interpreter on any platform, slowly: for tests."""

LACKS = {
    "cudnn": cudnn_lacks,
    "tpu": _tpu.lacks,
    "tpu_interpret": _tpu.lacks,
    "gpu": _gpu.lacks,
    "gpu_interpret": _gpu.lacks,
}
"""Name -> function of (q, k, bias, mask) that returns in words the unsupported argument, or None."""


class Choice(NamedTuple):
    """The implementation that `attention` runs for given arguments, and the reason."""

    implementation: str
    reason: str


def attention(q, k, v, *, bias=None, mask=None, causal=False, scale=None, implementation=None):
    """Multi-head attention.

    Args:
      q: queries [B, Lq, H, D].
      k: keys [B, Lk, H, D].
      v: values [B, Lk, H, D].
      bias: added to the scaled logits; broadcasts to [B, H, Lq, Lk].
      mask: bool, True where a query may see a key; broadcasts to [B, H, Lq, Lk]. A query without any visible key
        attends evenly to all keys.
      causal: query i sees keys 0..i only (positions count from the start of both).
      scale: factor on q k^T; defaults to D ** -0.5.
      implementation: a key of `IMPLEMENTATIONS`; None chooses by platform and shape (see `explain`).

    Returns:
      [B, Lq, H, D] in q's dtype.

    Raises:
      UserError: the shapes do not agree, the implementation does not exist, or it does not support the arguments.
    """
    choice = explain(q, k, v, bias=bias, mask=mask, causal=causal, implementation=implementation)
    run = IMPLEMENTATIONS[choice.implementation]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return run(q, k, v, bias=bias, mask=mask, causal=causal, scale=scale)


def explain(q, k, v, *, bias=None, mask=None, causal=False, scale=None, implementation=None) -> Choice:
    """Returns the `Choice` that `attention` makes for the same arguments (arrays or `jax.ShapeDtypeStruct`s).

    With implementation=None the platform decides, at trace time: the platform of the ambient mesh's devices
    (`jax.set_mesh`; a program compiled ahead of time for a TPU thus holds the kernel), else `jax.default_backend()`. On
    a TPU the choice is `tpu` if `tpu` supports the arguments. For float64 the choice is `reference`. In all other cases
    the choice is `xla`; `cudnn` and `gpu` (not yet timed on a GPU) run only by name.
    """
    del causal, scale
    _check(q, k, v, bias, mask)
    if implementation is None and q.dtype == jnp.float64:
        return Choice("reference", "dtype is float64; the softmax of the others is fp32")
    if implementation is None:
        device = jax.sharding.get_abstract_mesh().abstract_device
        platform, where = (device.platform, "the mesh's") if device else (jax.default_backend(), "the default")
        if platform != "tpu":
            return Choice("xla", f"{where} platform is {platform}")
        lacking = _tpu.lacks(q, k, bias, mask)
        if lacking:
            return Choice("xla", f"{where} platform is tpu, but `tpu` cannot do {lacking}")
        return Choice("tpu", f"{where} platform is tpu")
    if implementation not in IMPLEMENTATIONS:
        raise UserError(
            f"attention implementation is `{implementation}`; expected one of: {', '.join(IMPLEMENTATIONS)}"
        )
    lacking = LACKS.get(implementation, lambda *_: None)(q, k, bias, mask)
    if lacking:
        raise UserError(f"attention implementation `{implementation}` cannot do {lacking}; use another, or None")
    return Choice(implementation, "asked for by name")


def _check(q, k, v, bias, mask):
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if not (q.ndim == k.ndim == v.ndim == 4):
        raise UserError(f"attention needs [batch, length, heads, head_dim]; got {shapes}")
    if k.shape != v.shape or q.shape[:1] + q.shape[2:] != k.shape[:1] + k.shape[2:]:
        raise UserError(
            f"attention needs q, k, v of equal batch, heads and head_dim, and k, v of equal length; got {shapes}"
        )
    logits = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    for name, array in (("bias", bias), ("mask", mask)):
        if array is not None and (
            array.ndim != 4 or any(n not in (1, want) for n, want in zip(array.shape, logits, strict=True))
        ):
            raise UserError(f"attention {name} must broadcast to [B, H, Lq, Lk] = {logits}; got {array.shape}")
    if mask is not None and mask.dtype != jnp.bool_:
        raise UserError(f"attention mask must be bool (True = visible); got {mask.dtype}")
