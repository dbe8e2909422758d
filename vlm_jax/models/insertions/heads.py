"""Scales and offsets of the outputs of attention heads."""

from typing import NamedTuple

import flax.linen as nn

from vlm_jax import config
from vlm_jax.catalogue import method
from vlm_jax.models.insertion import new_parameter
from vlm_jax.models.layers import Attention


@method(
    family="insertions",
    paper="arXiv:2406.01563",
    where="authors' code",
    differs="a scale or an offset for each channel of attention heads' outputs",
)
class HeadOutputs(NamedTuple):
    """z_h <- (1 + A_h) z_h, or z_h + v_h, with z_h [head_dim] what head h passes to the last projection (LoFiT).

    heads * head_dim parameters at each place, [heads, head_dim].

    Attributes:
      where: regex of the last projection of attention, by its whole path.
      part: "scale" (A) or "offset" (v).
      std: standard deviation at init; 0 begins as nothing.
    """

    where: str = r".*/attn/out"
    part: str = "offset"
    std: float = 1e-3

    def takes(self, module, method):
        return method == "__call__" and isinstance(module.parent, Attention)

    def __call__(self, call, module, x):
        heads = module.parent.heads
        init = nn.initializers.normal(self.std) if self.std else nn.initializers.zeros
        new = new_parameter(module, self.part, init, (heads, x.shape[-1] // heads)).reshape(-1).astype(x.dtype)
        change = {"scale": lambda: x + new * x, "offset": lambda: x + new}
        return call(config.choose(change, self.part, "the part of head outputs")())
