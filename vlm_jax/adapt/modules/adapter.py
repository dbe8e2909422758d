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


@method(
    family="modules",
    system="AdaLink",
    paper="arXiv:2310.12100",
    differs="a linear bottleneck after what embeds patches, and one after what embeds tokens; blocks stay as they are",
    count="2 * rank * (D_t + D_v)",
    identity=True,
)
def adalink(
    model: nn.Module,
    *,
    rank: int = 16,
    where: str = r"image/patch_embed|(text|decoder)/token_embed",
    activation: str = "none",
) -> Inserted:
    """AdaLink (Wang et al. 2023): x + U D x for embedded patches and tokens x, each with its own U and D; U is 0 first.

    Args:
      model: any; captioners, too (`tune`).
      rank: width of the bottlenecks.
      where: regex of what embeds; one modality alone is "image/patch_embed" or "text/token_embed".
      activation: between D and U, a key of `ACTIVATIONS`.
    """
    return Inserted((Adapter(where, rank, activation=activation, bias=False),))
