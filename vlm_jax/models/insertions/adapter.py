"""Bottlenecks beside or after a module."""

import functools
from typing import NamedTuple

import flax.linen as nn

from vlm_jax import config
from vlm_jax.catalogue import method
from vlm_jax.models.insertion import dot, new_parameter
from vlm_jax.models.layers import ACTIVATIONS


@method(family="insertions", differs="a bottleneck beside or after a module")
class Adapter(NamedTuple):
    """dh = act(x down + b) up + c, with up and c 0 at init (Houlsby et al. 2019, arXiv:1902.00751, section 2.1).

    2 D r + r + D parameters at each place.

    Attributes:
      where: regex of the modules, by their whole path: attention ("attn", "cross_attn") or "mlp" of blocks.
      width: r.
      form: "serial": x is the module's output (Houlsby); "parallel": its input (AdaptFormer, arXiv:2205.13535).
      scale: s.
      activation: a key of `ACTIVATIONS`.
    """

    where: str = r".*/mlp"
    width: int = 64
    form: str = "serial"
    scale: float = 1.0
    activation: str = "relu"

    def takes(self, module, method):
        return method == "__call__"

    def __call__(self, call, module, x, *args, **kwargs):
        result = call(x, *args, **kwargs)
        h, *others = result if isinstance(result, tuple) else (result,)
        source = config.choose({"serial": h, "parallel": x}, self.form, "the form of an adapter")
        new = functools.partial(new_parameter, module)
        down = new("down", nn.initializers.lecun_normal(), (source.shape[-1], self.width))
        up = new("up", nn.initializers.zeros, (self.width, h.shape[-1]))
        act = config.choose(ACTIVATIONS, self.activation, "the activation of an adapter")
        hidden = act(dot(source, down) + new("down_bias", nn.initializers.zeros, down.shape[-1:]))
        h = h + (self.scale * (dot(hidden, up) + new("up_bias", nn.initializers.zeros, up.shape[-1:]))).astype(h.dtype)
        return (h, *others) if others else h
