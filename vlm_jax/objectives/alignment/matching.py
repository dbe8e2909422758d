"""Image-text matching: whether a picture and a text belong together, asked about pairs that are hard to tell."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from vlm_jax import config
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.models.transformer import AttentionInputs, Encoder, over_heads
from vlm_jax.objectives.contrastive import targets as targets_of
from vlm_jax.objectives.term import WHERE, Feature, Objective, Row, Selection, Term


class Fusion(Encoder, kw_only=True):
    """Blocks on a text's tokens that attend to a picture's tokens; two logits of the first token. See `Encoder`."""

    @nn.compact
    def __call__(self, text_tokens, image_tokens, mask):
        """[B, L, Dt], [B, N, Di], bool [B, L] -> [B, 2]."""
        x = nn.Dense(self.width, dtype=self.dtype, name="inputs")(text_tokens)
        x = self.stack(x, AttentionInputs(over_heads(mask), image_tokens)).tokens
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
    pad_id: int = 0,
) -> Objective:
    """Image-text matching with contrastive hard negatives (ALBEF, Li et al. 2021).

    3 B pairs: each image with its text, each image with a wrong text, and each text with a wrong image. Wrong ones are
    drawn by the softmax of the similarity that the contrastive loss has. The fusion's parameters belong to the term.
    An image that all texts match has no wrong one: its pair counts as true.

    Args:
      model: linen module with the outputs `image_embedding`, `image_tokens`, `text_embedding`, `text_tokens`, `scale`.
      fusion: fields of `Fusion`, such as dict(width=128, depth=2, heads=4).
      targets: "identity", or labels as for `contrastive`; pairs that match are never drawn as wrong.
      groups: negatives are mined within so many equal parts of the batch; see `Selection`.
      pad_id: id of padding.

    Metrics: `accuracy`.
    """
    given = {"width": 128, "depth": 1, "heads": 4, "pool": "none", "cross": "after", **(fusion or {})}
    fusion, targets = config.call(Fusion, given, f"{WHERE}.fusion"), targets_of.build(targets, f"{WHERE}.targets")
    if targets.labels is None:
        raise UserError(f"{WHERE}: matching needs targets that match or do not, such as `identity`, not soft ones")

    def seen(outputs, ctx):
        keys = ("image_embedding", "image_tokens", "text_embedding", "text_tokens")
        scale = jnp.broadcast_to(outputs["scale"], (len(outputs["token_ids"]),))
        return {key: outputs[key] for key in keys} | {"scale": scale} | targets.features(outputs)

    def mine(features, rows, ctx):
        logits = features["scale"][:, None] * features["image_embedding"] @ features["text_embedding"].T
        of_images, of_texts = targets.of(features, rows, len(logits))
        of_text, of_image = jax.random.split(ctx.rng)
        hard = lambda rng, logits, matches: jax.random.categorical(rng, jnp.where(matches, -1e9, logits))
        i = jnp.arange(len(logits))
        images = jnp.concatenate([i, i, hard(of_image, logits.T, of_texts.T)])
        texts = jnp.concatenate([i, hard(of_text, logits, of_images), i])
        return {
            "image_tokens": Feature("image_tokens", images),
            "text_tokens": Feature("text_tokens", texts),
            "token_ids": Row("token_ids", texts),
            "match": of_images[images, texts].astype(jnp.int32),
        }

    def features(outputs, ctx):
        mask = outputs["token_ids"] != pad_id
        return outputs.part("fusion", fusion, outputs["text_tokens"], outputs["image_tokens"], mask)

    def loss(outputs, features, rows, ctx):
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(features, rows["match"])
        return jnp.mean(losses), {"accuracy": jnp.mean(jnp.argmax(features, -1) == rows["match"])}

    term = Term("matching", features, loss, on="pairs")
    return Objective((term,), (Selection("pairs", seen, mine, groups=groups),))
