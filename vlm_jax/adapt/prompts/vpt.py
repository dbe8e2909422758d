"""Visual prompt tuning: learned tokens before the image tower's own."""

import flax.linen as nn

from vlm_jax.adapt.recipe import Inserted
from vlm_jax.catalogue import method
from vlm_jax.models.insertions.prompts import Prompt


@method(
    family="prompts",
    system="VPT",
    paper="arXiv:2203.12119",
    where="section 3.2",
    differs="learned tokens before the patches",
    claim="few_shot: prompts in the image tower rival tuning all of it",
    count="length * D_v",
)
def vpt(model: nn.Module, *, length: int = 8) -> Inserted:
    """VPT-shallow."""
    return Inserted((Prompt(length=length),))


@method(
    family="prompts",
    system="VPT",
    paper="arXiv:2203.12119",
    where="section 3.2",
    differs="learned tokens before the patches, new ones in every block",
    claim="few_shot: prompts in the image tower rival tuning all of it",
    count="length * D_v * (depth or L_v)",
)
def vpt_deep(model: nn.Module, *, length: int = 8, depth: int | None = None) -> Inserted:
    """VPT-deep."""
    return Inserted((Prompt(length=length, depth=depth),))
