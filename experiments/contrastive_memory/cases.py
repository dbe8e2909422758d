"""The TPU kernel at 4,096 x 4,096 x 1,152 in bf16, for `kernel_schedules/tpu_cycles.py`.

    python -m experiments.kernel_schedules.tpu_cycles experiments.contrastive_memory.cases:softmax

Four matrix units of 128 x 128 need 294,912 cycles for the forward pass and 1,179,648 with the backward pass, which
recomputes the logits.
"""

import jax
import jax.numpy as jnp

from vlm_jax.kernels.contrastive import tpu
from vlm_jax.kernels.contrastive.block import Side, Spec

SIZE, WIDTH = 4096, 1152


def _cases(spec, sides):
    """Forward and backward cases; `sides(scale, x, y, stats or None)` returns the kernels' arguments."""

    def forward(*arrays):
        return tpu.forward(spec, *sides(*arrays, None))

    def both(*arrays):
        stats = forward(*arrays)
        return stats, tpu.backward(spec, *sides(*arrays, stats))

    z = jax.ShapeDtypeStruct((SIZE, WIDTH), jnp.bfloat16)
    arrays = jax.ShapeDtypeStruct((), jnp.float32), z, z
    return {"forward": (forward, arrays), "forward + backward": (both, arrays)}


def softmax():
    """Cases of the softmax kernel; the backward pass differentiates the sum of the log-sum-exps."""

    def sides(scale, x, y, stats):
        if stats is None:
            return scale, Side(x), Side(y)
        return scale, *(Side(z, max=s.max, weight=1 / s.sum) for z, s in zip((x, y), stats, strict=True))

    return _cases(Spec(), sides)


def sigmoid():
    """Cases of the sigmoid kernel; the backward pass differentiates the loss."""

    def sides(scale, x, y, stats):
        labels, ones = jnp.arange(SIZE), jnp.ones(SIZE)
        return scale, Side(x, -10 * ones, labels, weight=None if stats is None else ones), Side(y, labels=labels)

    return _cases(Spec("sigmoid"), sides)
