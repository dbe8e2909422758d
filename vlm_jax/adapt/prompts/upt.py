"""UPT: prompts of both towers come from one light transformer layer."""

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
from flax.traverse_util import unflatten_dict

from vlm_jax.adapt.prompts.placing import spread, widths
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.models.insertions.prompts import Context, Prompt
from vlm_jax.params.table import named_leaves


class Unified(NamedTuple):
    """Unified prompts (UPT: Zang et al. 2022, arXiv:2210.07225, section 3.3), through one light transformer layer.

    U' = SA(U) + LN(U), then FFN(LN(U')) + LN(U'). The first n_text rows of the result go before the words, the other
    rows before the patches, at the towers' first block. The image rows pass a dense layer, because the towers' widths
    may differ; the paper's towers have one width.

    With d = D_text and m = n_text + n_image: m d + 4 (d^2 + d) + 4 d + 2 d h + h + d + d D_image + D_image parameters.

    Attributes:
      text_length: n_text.
      image_length: n_image.
      hidden: h; defaults to d.
      heads: of the self-attention.
      std: of U at init.
    """

    text_length: int = 4
    image_length: int = 4
    hidden: int | None = None
    heads: int = 4
    std: float = 0.02

    def insertions(self, model: nn.Module, at: int) -> tuple:
        width, _ = widths(model)
        if width % self.heads:
            raise UserError(f"upt: {self.heads} heads do not divide the text tower's width {width}; change `heads`")
        return Context("text", self.text_length, at), Prompt("image", self.image_length)

    def begin(self, rng: jax.Array, model: nn.Module, leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return named_leaves(_Unify(self, *widths(model)).init(rng)["params"])

    def combine(self, own: Mapping[str, jax.Array], leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        module = _Unify(self, own["prompts"].shape[1], own["image/bias"].shape[0])
        text, image = module.apply({"params": unflatten_dict(dict(own), sep="/")})
        return spread("text", text[None], leaves) | spread("image", image[None], leaves)


class _Unify(nn.Module):
    recipe: Unified
    width: int
    image_width: int

    @nn.compact
    def __call__(self):
        """[n_text, D_text], [n_image, D_image]."""
        sizes = self.recipe
        rows = sizes.text_length + sizes.image_length
        x = self.param("prompts", nn.initializers.normal(sizes.std), (rows, self.width))
        x = nn.MultiHeadDotProductAttention(sizes.heads, name="attn")(x) + nn.LayerNorm(name="norm1")(x)
        x = nn.LayerNorm(name="norm2")(x)
        hidden = nn.gelu(nn.Dense(sizes.hidden or self.width, name="fc1")(x))
        x = nn.Dense(self.width, name="fc2")(hidden) + x
        text, image = x[: sizes.text_length], x[sizes.text_length :]
        return text, nn.Dense(self.image_width, name="image")(image)


@method(
    family="prompts",
    system="UPT",
    paper="arXiv:2210.07225",
    where="section 3.3",
    differs="one small transformer makes the prompts of both towers",
    claim="few_shot: UPT's harmonic mean above CoOp's",
    count="(text_length + image_length + 9) * D_t + 4 * D_t**2 + (2 * D_t + 1) * (hidden or D_t) + (D_t + 1) * D_v",
)
def upt(
    model: nn.Module,
    *,
    text_length: int = 4,
    image_length: int = 4,
    hidden: int | None = None,
    heads: int = 4,
    std: float = 0.02,
) -> Unified:
    """UPT."""
    return Unified(text_length, image_length, hidden, heads, std)
