"""CoOp and CoCoOp: learned vectors in the place of a prompt's words."""

import flax.linen as nn

from vlm_jax.adapt.recipe import Inserted
from vlm_jax.catalogue import method
from vlm_jax.models.insertions.prompts import Context


@method(
    family="prompts",
    paper="arXiv:2109.01134",
    where="section 3.2",
    differs="one learned context for all classes",
    claim="few_shot: contexts gain on the classes they see and lose on new ones",
    count="length * D_t",
)
def coop(model: nn.Module, *, length: int = 4, std: float = 0.02) -> Inserted:
    """CoOp."""
    return Inserted((Context(length=length, std=std),))


@method(
    family="prompts",
    paper="arXiv:2203.05557",
    where="section 3.2",
    differs="a Meta-Net moves the context by the picture",
    claim="few_shot: CoCoOp's harmonic mean above CoOp's",
    count="length * D_t + E * (E // 16) + E // 16 + (E // 16) * D_t + D_t",
)
def cocoop(model: nn.Module, *, length: int = 4, std: float = 0.02) -> Inserted:
    """CoCoOp."""
    width = model.text.out_dim or model.text.width
    return Inserted((Context(length=length, std=std, image_width=width),))
