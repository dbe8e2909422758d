"""Prompts for both towers made of one thing: coupled (MaPLe) and unified (UPT).

What trains are not the prompts that stand in the towers but what they are computed from, so that gradients of both
towers meet there. Once trained they are prompts like others: a file of them, and a model with them, need no more.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from vlm_jax.errors import UserError
from vlm_jax.models.insertion import Context, Prompt
from vlm_jax.params.table import named_leaves


class Coupled(NamedTuple):
    """Multi-modal prompts (MaPLe: Khattak et al. 2023, arXiv:2210.03117, section 3.2): V_j = P_j K_j + b_j.

    J n D_text + J (D_text D_image + D_image) parameters. Both towers have prompts in their first J blocks: the text
    tower in the place of words, the image tower beside its tokens.

    Attributes:
      length: n.
      depth: J; of a tower with fewer blocks, all.
      std: of P at init.
    """

    length: int = 2
    depth: int = 9
    std: float = 0.02

    def insertions(self, model: nn.Module, at: int) -> tuple:
        depth = self._depth(model)
        return Context("text", self.length, at, depth), Prompt("image", self.length, depth)

    def begin(self, rng: jax.Array, model: nn.Module, leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        text, image = _widths(model)
        depth, (first, second) = self._depth(model), jax.random.split(rng)
        kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=0)
        return {
            "prompts": self.std * jax.random.normal(first, (depth, self.length, text)),
            "kernel": kernel(second, (depth, text, image)),
            "bias": jnp.zeros((depth, image)),
        }

    def combine(self, own: Mapping[str, jax.Array], leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        image = jnp.einsum("jnd,jde->jne", own["prompts"], own["kernel"], precision="highest") + own["bias"][:, None]
        return _spread("text", own["prompts"], leaves) | _spread("image", image, leaves)

    def _depth(self, model):
        _widths(model)
        return min(self.depth, model.text.depth, model.image.depth)


class Unified(NamedTuple):
    """Unified prompts (UPT: Zang et al. 2022, arXiv:2210.07225, section 3.3), through one light transformer layer.

    U' = SA(U) + LN(U), then FFN(LN(U')) + LN(U'), of which the first rows go before the words, the others, through a
    dense layer where the paper has towers of one width, before the patches; all at the towers' first block.

    With d = D_text and m = n_text + n_image: m d + 4 (d^2 + d) + 4 d + 2 d h + h + d + d D_image + D_image parameters.

    Attributes:
      text_length: n_text.
      image_length: n_image.
      hidden: h; None is d.
      heads: of the self-attention.
      std: of U at init.
    """

    text_length: int = 4
    image_length: int = 4
    hidden: int | None = None
    heads: int = 4
    std: float = 0.02

    def insertions(self, model: nn.Module, at: int) -> tuple:
        width, _ = _widths(model)
        if width % self.heads:
            raise UserError(f"upt: {self.heads} heads do not divide the text tower's width {width}; change `heads`")
        return Context("text", self.text_length, at), Prompt("image", self.image_length)

    def begin(self, rng: jax.Array, model: nn.Module, leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return named_leaves(_Unify(self, *_widths(model)).init(rng)["params"])

    def combine(self, own: Mapping[str, jax.Array], leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        module = _Unify(self, own["prompts"].shape[1], own["image/bias"].shape[0])
        text, image = module.apply({"params": unflatten_dict(dict(own), sep="/")})
        return _spread("text", text[None], leaves) | _spread("image", image[None], leaves)


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


def _widths(model: Any) -> tuple[int, int]:
    for tower in ("text", "image"):
        if not hasattr(getattr(model, tower, None), "depth"):
            raise UserError(f"maple and upt put prompts into two transformers; this model's {tower} tower is none")
    return model.text.width, model.image.width


def _spread(tower: str, rows: jax.Array, leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Rows [J, n, D], one of each of the first J blocks, as the inserted parameters of a tower; 0 for later blocks."""
    spread = {}
    for name, leaf in leaves.items():
        if not re.fullmatch(rf"{tower}/(.*/)?inserted_(context|prompt)", name):
            continue
        block = re.search(r"/blocks(?:_(\d+))?/", name)
        if block is None:
            spread[name] = rows[0]
        elif block[1] is None:
            spread[name] = jnp.zeros_like(leaf).at[: len(rows)].set(rows)
        else:
            spread[name] = rows[int(block[1])] if int(block[1]) < len(rows) else jnp.zeros_like(leaf)
    return spread
