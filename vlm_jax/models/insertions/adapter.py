"""Bottlenecks beside or after a module."""

from typing import NamedTuple

import flax.linen as nn
import jax

from vlm_jax import config
from vlm_jax.catalogue import method
from vlm_jax.models.insertion import dot, new_parameter
from vlm_jax.models.layers import ACTIVATIONS


@method(family="insertions", differs="a bottleneck beside or after a module")
class Adapter(NamedTuple):
    """dh = act(x down + b) up + c, with up and c 0 at init (Houlsby et al. 2019, arXiv:1902.00751, section 2.1).

    2 D r + r + D parameters at each place, 2 D r without biases.

    Attributes:
      where: regex of the modules, by their whole path: attention ("attn", "cross_attn") or "mlp" of blocks, or what
        embeds patches or tokens ("patch_embed", "token_embed"), after which "serial" adapters stand.
      width: r.
      form: "serial": x is the module's output (Houlsby); "parallel": its input (AdaptFormer, arXiv:2205.13535).
      scale: s.
      activation: a key of `ACTIVATIONS`, or "none".
      bias: whether there are b and c.
      name: stands in the names of the parameters, for several adapters at one module.
    """

    where: str = r".*/mlp"
    width: int = 64
    form: str = "serial"
    scale: float = 1.0
    activation: str = "relu"
    bias: bool = True
    name: str = ""

    def takes(self, module, method):
        return method == "__call__"

    def __call__(self, call, module, x, *args, **kwargs):
        result = call(x, *args, **kwargs)
        h, *others = result if isinstance(result, tuple) else (result,)
        source = config.choose({"serial": h, "parallel": x}, self.form, "the form of an adapter")
        h = h + self.change(module, source, h.shape[-1]).astype(h.dtype)
        return (h, *others) if others else h

    def change(self, module: nn.Module, x: jax.Array, width: int) -> jax.Array:
        """Returns s dh of x, [..., D] -> [..., width]; creates the parameters in the module's scope."""
        named = f"{self.name}_" if self.name else ""
        new = lambda name, init, *shape: new_parameter(module, f"{named}{name}", init, shape)
        zeros = nn.initializers.zeros
        down = new("down", nn.initializers.lecun_normal(), x.shape[-1], self.width)
        up = new("up", zeros, self.width, width)
        act = config.choose(ACTIVATIONS | {"none": lambda x: x}, self.activation, "the activation of an adapter")
        if not self.bias:
            return self.scale * dot(act(dot(x, down)), up)
        hidden = act(dot(x, down) + new("down_bias", zeros, self.width))
        return self.scale * (dot(hidden, up) + new("up_bias", zeros, width))
