"""Prefix tuning: learned keys and values in every block."""

import flax.linen as nn

from vlm_jax.adapt.recipe import Inserted
from vlm_jax.catalogue import method
from vlm_jax.models.insertion import Prefix


@method(
    family="prompts",
    system="P-Tuning-v2",
    paper="arXiv:2110.07602",
    where="section 3.2",
    differs="keys and values before those of every block, as in prefix tuning (arXiv:2101.00190)",
    claim="few_shot: prefixes above zero-shot",
    count="2 * length * (L_t * D_t + L_v * D_v)",
)
def prefix(model: nn.Module, *, where: str = r".*/attn", length: int = 4, std: float = 0.02) -> Inserted:
    """Prefix tuning; P-Tuning v2 applies it to all model sizes and tasks."""
    return Inserted((Prefix(where, length, std),))
