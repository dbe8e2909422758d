"""Keys and values that every token sees."""

from typing import NamedTuple

import flax.linen as nn

from vlm_jax.catalogue import method
from vlm_jax.models.insertion import new_parameter
from vlm_jax.models.layers import Attention, KeyValues


@method(family="insertions", differs="keys and values that every token sees")
class Prefix(NamedTuple):
    """Keys and values that every token sees before the others (Li and Liang 2021, arXiv:2101.00190, section 4.2).

    2 P D parameters at each place.

    Attributes:
      where: regex of the attention modules, by their whole path.
      length: P.
      std: standard deviation at init.
    """

    where: str = r".*/attn"
    length: int = 10
    std: float = 0.02

    def takes(self, module, method):
        return isinstance(module, Attention) and method == "__call__"

    def __call__(self, call, module, x, *args, **kwargs):
        shape = (self.length, module.heads, module.head_dim or x.shape[-1] // module.heads)
        init = nn.initializers.normal(self.std)
        return call(
            x,
            *args,
            **kwargs,
            prefix=KeyValues(*(new_parameter(module, name, init, shape) for name in ("key", "value"))),
        )
