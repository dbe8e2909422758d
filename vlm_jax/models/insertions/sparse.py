"""Low-rank updates of dense layers with single scalars beside them."""

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax

from vlm_jax.catalogue import method
from vlm_jax.models.insertion import dot, new_parameter
from vlm_jax.models.insertions.low_rank import LowRank


@method(
    family="insertions",
    paper="arXiv:2111.00160",
    differs="a low-rank update of a dense layer and a sparse one, of fixed places",
)
class LowRankSparse(NamedTuple):
    """DSEE's update (Chen et al. 2021): h = x W + (alpha / r) x (a b + s), with b and s 0 at init.

    s [in, out] is stored and multiplied dense: its places are a mask of what trains, of the optimizer (`only`) or of
    `recipe.Masked`, and files hold its places and values alone. `insertion.merge` folds both into plain kernels.

    Attributes:
      where: regex of the dense layers, by their whole path.
      rank: r.
      alpha: None means r.
    """

    where: str = r".*/attn/(query|value)"
    rank: int = 4
    alpha: float | None = None

    @property
    def low_rank(self) -> LowRank:
        return LowRank(self.where, self.rank, self.alpha)

    def takes(self, module, method):
        return method == "__call__"

    def __call__(self, call, module, x):
        h = self.low_rank(call, module, x)
        s = new_parameter(module, "s", nn.initializers.zeros, (x.shape[-1], h.shape[-1]))
        return h + (self.low_rank.factor * dot(x, s)).astype(h.dtype)

    def merged(self, kernel: jax.Array, new: Mapping[str, jax.Array]) -> jax.Array:
        """Returns the kernel [..., in, out] of a plain layer that computes the same; see `insertion.merge`."""
        return self.low_rank.merged(kernel, new) + self.low_rank.factor * new["s"]
