"""Low-rank updates of dense layers."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.models.insertion import dot, new_leaves, new_parameter
from vlm_jax.params.table import named_leaves


@method(family="insertions", differs="a low-rank update of a dense layer")
class LowRank(NamedTuple):
    """LoRA (Hu et al. 2021, arXiv:2106.09685, equation 3): h = x W + (alpha / r) x a b, with b 0 at init.

    r (in + out) parameters at each place; `merge` adds them to plain kernels.

    Attributes:
      where: regex of the dense layers, by their whole path.
      rank: r.
      alpha: None means r.
      importance: whether (x a)_i is weighted by a parameter w_i, N(0, 1) at init (CoDyRA, arXiv:2412.01004).
    """

    where: str = r".*/attn/(query|value)"
    rank: int = 4
    alpha: float | None = None
    importance: bool = False

    @property
    def factor(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def takes(self, module, method):
        return method == "__call__"

    def __call__(self, call, module, x):
        h = call(x)
        # U(-1 / sqrt(in), 1 / sqrt(in)), as in the authors' code
        a = new_parameter(
            module, "a", nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"), (x.shape[-1], self.rank)
        )
        b = new_parameter(module, "b", nn.initializers.zeros, (self.rank, h.shape[-1]))
        if self.importance:
            a = a * new_parameter(module, "importance", nn.initializers.normal(1.0), (self.rank,))
        return h + (self.factor * dot(dot(x, a), b)).astype(h.dtype)


def merge(params: Any, insertions: tuple) -> Any:
    """Returns plain parameters of a model with one `LowRank` insertion: each kernel is W + (alpha / r) a diag(w) b."""
    if len(insertions) != 1 or not isinstance(insertions[0], LowRank):
        raise UserError(f"merge needs exactly one insertion, a LowRank; got {insertions}")
    leaves, new = named_leaves(params), new_leaves(params)

    def plain(name):
        module, _, last = name.rpartition("/")
        if last != "kernel" or f"{module}/inserted_a" not in new:
            return leaves[name]
        a = new[f"{module}/inserted_a"] * new.get(f"{module}/inserted_importance", jnp.ones(1))[..., None, :]
        return leaves[name] + insertions[0].factor * (a @ new[f"{module}/inserted_b"])

    return unflatten_dict({name: plain(name) for name in leaves if name not in new}, sep="/")
