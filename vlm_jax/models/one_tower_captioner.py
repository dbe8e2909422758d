"""A captioner that is one transformer: the image tower itself writes (Fang et al. 2026, GenLIP)."""

from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from vlm_jax.models.decoder import WRITING, Decoded
from vlm_jax.models.prefix_lm import Prefixed
from vlm_jax.models.vit import Tokens


class OneTowerCaptioner(Prefixed, kw_only=True):
    """An image tower whose blocks go on to read a text: patches see each other, a text sees them and itself so far.

    "Let ViT Speak" (arXiv:2605.00809), section 3.1. Patches do not see the text, so that the tower alone is an encoder:
    its normalised tokens are the picture's features. Positions are those of the tower and of the token table; the
    paper has rotary ones over both.

    Attributes:
      image: `ViT`, without pool and head.
      decoder: `TokenTable` of the tower's width.
    """

    image: nn.Module
    can: ClassVar = frozenset({"describe"})

    outputs: ClassVar = WRITING | {
        "context": lambda o: o.apply("patches", o["image"]),
        "image_tokens": lambda o: o.apply("see", o["image"])[0],
    }

    def patches(self, images, *, train=False):
        """Images -> (embedded patches [B, N, D], their mask bool [B, N] or None)."""
        embedded = self.image(images, blocks=False, train=train)
        return embedded.tokens, embedded.mask

    def see(self, images, *, train=False):
        """Images -> (tokens of the tower after its blocks and norm [B, N, D], their mask bool [B, N] or None)."""
        encoded = self.image(images, train=train)
        return encoded.tokens, encoded.mask

    def encode(self, images, *, train=False):
        """Images -> (embedded patches [B, N, D], their mask bool [B, N])."""
        patches, mask = self.patches(images, train=train)
        return patches, jnp.ones(patches.shape[:2], bool) if mask is None else mask

    def sequence(self, token_ids, context, *, place, train, **options):
        """Returns `Decoded` of the embedded patches, if any, and of token_ids [B, L]; options of `vit.Tokens`."""
        x = self.decoder(token_ids, place)
        if context is not None:
            x = jnp.concatenate([context.astype(x.dtype), x], axis=1)
        return Decoded(*self.image(Tokens(x, **options), train=train))

    @nn.nowrap
    def new_caches(self, batch, length):
        """As in `Conditional`."""
        return self.image.new_caches(batch, length)
