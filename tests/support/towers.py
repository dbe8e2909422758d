"""The smallest model with two embeddings, in the dtype of its parameters: compiles in a second."""

from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from vlm_jax.models import Embeddings, Encoded
from vlm_jax.models.fields import Part
from vlm_jax.models.two_tower import EMBEDDINGS


class Towers(nn.Module):
    """Pictures [B, H, W, 3] are cut into four patches, texts int [B, L] are looked up.

    Attributes:
      tokens: whether an embedding is a vector for each patch and token, as of pool "all".
      dropout: rate, of the patches.
      space: see `TwoTower`.
    """

    tokens: bool = False
    dropout: float = 0.0
    space: Part | None = None
    outputs: ClassVar = EMBEDDINGS | {
        "patch_embeddings": lambda o: each_token(o.params["image_head"], o["image_tokens"]),
        "class_embeddings": lambda o: o["patch_embeddings"][:, :2],
        "word_embeddings": lambda o: each_token(o.params["text_head"], o["text_tokens"]),
    }

    @nn.compact
    def __call__(self, images, token_ids, *, hidden=None, kept=None, train=False):
        scale = jnp.exp(self.param("logit_scale", nn.initializers.constant(np.log(10.0)), ()))
        bias = self.param("logit_bias", nn.initializers.constant(-3.0), ())
        image = text = patches = words = pooled = image_parts = text_parts = None
        embed = nn.Embed(14, 6, name="embed")
        space = self.space and self.space(name="space")
        if images is not None:
            x = nn.Dropout(self.dropout, deterministic=not train)(images.reshape(len(images), 4, -1))
            x = nn.Dense(7, name="image_fc")(x)
            patches = nn.gelu(x if hidden is None else jnp.where(hidden[0][..., None], hidden[1], x))
            patches = patches if kept is None else jnp.take_along_axis(patches, kept[..., None], axis=1)
            pooled = nn.Dense(5, name="image_head")(patches)
            image, pooled = self._unit(pooled), pooled.mean(1)
        if token_ids is not None:
            words = embed(token_ids)
            text = self._unit(nn.Dense(5, name="text_head")(words))
        if space and images is not None:
            image, image_parts = space(Encoded(image, patches, None), "image", embed.embedding)
        if space and token_ids is not None:
            text, text_parts = space(Encoded(text, words, None), "text", embed.embedding)
        return Embeddings(image, text, patches, words, scale, bias, pooled, None, image_parts, text_parts)

    def _unit(self, x):
        x = x if self.tokens else x.mean(1)
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def each_token(head, tokens):
    """Unit vectors of tokens [B, N, D], by the parameters of a head."""
    x = tokens @ head["kernel"] + head["bias"]
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
