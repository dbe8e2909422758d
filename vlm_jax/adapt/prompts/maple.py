"""MaPLe: prompts of the image tower are linear in those of the text tower."""

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.adapt.prompts.placing import common_depth, deep, spread, widths
from vlm_jax.catalogue import method


class Coupled(NamedTuple):
    """Multi-modal prompts (MaPLe: Khattak et al. 2023, arXiv:2210.03117, section 3.2): V_j = P_j K_j + b_j.

    J n D_text + J (D_text D_image + D_image) parameters. Both towers have prompts in their first J blocks: the text
    tower in the place of words, the image tower beside its tokens.

    Attributes:
      length: n.
      depth: J, capped at the number of blocks of the shallower tower.
      std: of P at init.
    """

    length: int = 2
    depth: int = 9
    std: float = 0.02

    def insertions(self, model: nn.Module, at: int) -> tuple:
        return deep(model, self.length, self.depth, at)

    def begin(self, rng: jax.Array, model: nn.Module, leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        text, image = widths(model)
        depth, (first, second) = common_depth(model, self.depth), jax.random.split(rng)
        kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=0)
        return {
            "prompts": self.std * jax.random.normal(first, (depth, self.length, text)),
            "kernel": kernel(second, (depth, text, image)),
            "bias": jnp.zeros((depth, image)),
        }

    def combine(self, own: Mapping[str, jax.Array], leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        image = jnp.einsum("jnd,jde->jne", own["prompts"], own["kernel"], precision="highest") + own["bias"][:, None]
        return spread("text", own["prompts"], leaves) | spread("image", image, leaves)


@method(
    family="prompts",
    system="MaPLe",
    paper="arXiv:2210.03117",
    where="section 3.2",
    differs="deep prompts of both towers, coupled linearly",
    claim="few_shot: MaPLe's harmonic mean above CoOp's",
    count="min(depth, L_t, L_v) * (length * D_t + D_t * D_v + D_v)",
)
def maple(model: nn.Module, *, length: int = 2, depth: int = 9, std: float = 0.02) -> Coupled:
    """MaPLe."""
    return Coupled(length, depth, std)
