"""Adapters after the towers: on each embedding alone (CLIP-Adapter), or on a picture and all classes together."""

import flax.linen as nn

from vlm_jax.adapt.recipe import Inserted
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.models.insertions.after_towers import JointAttention, OutputAdapter


@method(
    family="modules",
    system="CLIP-Adapter",
    paper="arXiv:2110.04544",
    where="authors' code",
    differs="a bottleneck after the image tower, mixed with the tower's embedding",
    count="2 * E * (E // reduction)",
)
def clip_adapter(
    model: nn.Module, *, reduction: int = 4, image_share: float = 0.2, text_share: float = 0.0
) -> Inserted:
    """CLIP-Adapter (Gao et al. 2021); `text_share` above 0 adds an adapter after the text tower.

    A share of 0 leaves that adapter out.
    """
    shares = {"image": image_share, "text": text_share}
    if not any(shares.values()):
        raise UserError("clip_adapter has no adapter: image_share and text_share are 0; set one above 0")
    return Inserted(tuple(OutputAdapter(where, reduction, share) for where, share in shares.items() if share))


@method(
    family="modules",
    system="MultiModal-Adapter",
    paper="arXiv:2409.02958",
    where="abstract",
    differs="attention over a picture's embedding and those of all classes changes both",
    count="2 * E * (E // reduction) + E // reduction + E + 4 * (E // reduction) * (E // reduction + 1)",
)
def multimodal_adapter(model: nn.Module, *, reduction: int = 4, heads: int = 4, share: float = 0.2) -> Inserted:
    """Multi-Modal Adapter (Seputis et al. 2024)."""
    return Inserted((JointAttention(reduction, heads, share),))
