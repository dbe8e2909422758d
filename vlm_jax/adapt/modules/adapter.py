"""Adapters: small MLPs beside a block's parts, in the unified view h + s dh."""

import flax.linen as nn

from vlm_jax.adapt.recipe import Inserted
from vlm_jax.catalogue import method
from vlm_jax.models.insertions.adapter import Adapter


@method(
    family="modules",
    system="Unified-PETL",
    paper="arXiv:1902.00751",
    where="section 2.1; unified view: arXiv:2110.04366, table 1",
    differs="a bottleneck after the MLP of each block; form and place are options",
    claim="few_shot: adapters above zero-shot",
    count="L_t * (2 * D_t * width + width + D_t) + L_v * (2 * D_v * width + width + D_v)",
    identity=True,
)
def adapter(
    model: nn.Module,
    *,
    where: str = r".*/mlp",
    width: int = 64,
    form: str = "serial",
    scale: float = 1.0,
    activation: str = "relu",
) -> Inserted:
    """Adapters of Houlsby et al."""
    return Inserted((Adapter(where, width, form, scale, activation),))


@method(
    family="modules",
    system="Unified-PETL",
    paper="arXiv:2205.13535",
    where="section 3.2",
    differs="a bottleneck parallel to the MLP, scaled by 0.1",
    claim="few_shot: adapters above zero-shot",
    count="L_t * (2 * D_t * width + width + D_t) + L_v * (2 * D_v * width + width + D_v)",
    identity=True,
)
def adaptformer(
    model: nn.Module, *, where: str = r".*/mlp", width: int = 64, scale: float = 0.1, activation: str = "relu"
) -> Inserted:
    """AdaptFormer."""
    return Inserted((Adapter(where, width, "parallel", scale, activation),))
