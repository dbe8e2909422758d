"""Image-text matching: whether a picture and a text belong together, asked about pairs that are hard to tell."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import optax

from vlm_jax import config
from vlm_jax.catalogue import method
from vlm_jax.models.block import AttentionInputs, over_heads
from vlm_jax.models.transformer import Encoder
from vlm_jax.models.vocabulary import is_text
from vlm_jax.objectives.selections import hard_pairs
from vlm_jax.objectives.term import WHERE, Objective, Term


class Fusion(Encoder, kw_only=True):
    """Blocks on a text's tokens that attend to a picture's tokens; two logits of the first token. See `Encoder`."""

    @nn.compact
    def __call__(self, text_tokens, image_tokens, mask, image_mask=None):
        """[B, L, Dt], [B, N, Di], bool [B, L], bool [B, N] or None -> [B, 2]."""
        x = nn.Dense(self.width, dtype=self.dtype, name="inputs")(text_tokens)
        x = self.stack(x, AttentionInputs(over_heads(mask), image_tokens, over_heads(image_mask))).tokens
        return nn.Dense(2, dtype=self.dtype, name="head")(x[:, 0])


@method(
    family="terms",
    paper="arXiv:2107.07651",
    where="section 3.2",
    differs="a fusion of both towers' tokens tells true pairs from mined ones",
)
def matching(
    *,
    model: Any,
    fusion: Mapping[str, Any] | None = None,
    targets: str | Mapping[str, Any] = "identity",
    groups: int = 1,
    pad_id: int | None = None,
) -> Objective:
    """Image-text matching with contrastive hard negatives (ALBEF, Li et al. 2021), on the pairs of `hard_pairs`.

    Args:
      model: linen module with the outputs that `hard_pairs` reads.
      fusion: fields of `Fusion`, such as dict(width=128, depth=2, heads=4); its parameters belong to the term.
      targets, groups: see `hard_pairs`.
      pad_id: id of padding; the tokenizer's, which is the default.

    Metrics: `accuracy`.
    """
    given = {"width": 128, "depth": 1, "heads": 4, "pool": "none", "cross": "after", **(fusion or {})}
    fusion = config.call(Fusion, given, f"{WHERE}.fusion")

    def features(outputs, ctx):
        mask = is_text(outputs["token_ids"], *ctx.special(pad_id))
        tokens = outputs["text_tokens"], outputs["image_tokens"]
        return outputs.part("fusion", fusion, *tokens, mask, outputs.rows.get("image_mask"))

    def loss(outputs, features, rows, ctx):
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(features, rows["match"])
        return jnp.mean(losses), {"accuracy": jnp.mean(jnp.argmax(features, -1) == rows["match"])}

    pairs = hard_pairs(model=model, targets=targets, groups=groups)
    return Objective((Term("matching", features, loss, on=pairs.name),), (pairs,))
