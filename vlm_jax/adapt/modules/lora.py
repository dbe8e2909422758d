"""LoRA: low-rank updates of dense layers."""

import flax.linen as nn

from vlm_jax.adapt.recipe import Inserted
from vlm_jax.catalogue import method
from vlm_jax.models.insertion import LowRank


@method(
    family="modules",
    paper="arXiv:2106.09685",
    where="eq. 3",
    differs="a low-rank update beside dense layers, which merges into them",
    claim="few_shot: LoRA above zero-shot",
    count="4 * rank * (L_t * D_t + L_v * D_v)",
    identity=True,
)
def lora(
    model: nn.Module, *, where: str = r".*/attn/(query|value)", rank: int = 4, alpha: float | None = None
) -> Inserted:
    """LoRA."""
    return Inserted((LowRank(where, rank, alpha),))
