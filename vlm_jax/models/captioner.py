"""Captioners: an image tower and a decoder that describes the picture (Tschannen et al. 2023, "Cap" and "CapPa")."""

from typing import ClassVar

import flax.linen as nn

from vlm_jax.models.decoder import WRITING, Conditional


class Captioner(Conditional, kw_only=True):
    """An image tower, and a decoder that reads the tower's tokens through cross-attention.

    "Image Captioners Are Scalable Vision Learners Too" (arXiv:2306.07915), section 3. The inputs are images, floating
    [B, H, W, 3].

    Attributes:
      image: the image tower, without pool and head; its normalised tokens are the context.
      decoder: `Decoder`.
    """

    image: nn.Module
    can: ClassVar = frozenset({"describe"})

    outputs: ClassVar = WRITING | {
        "context": lambda o: o.apply("encode", o["image"]),
        "image_tokens": lambda o: o["context"][0],
    }

    def encode(self, images, *, train=False):
        """Images -> (context [B, N, D], its mask bool [B, N] or None)."""
        encoded = self.image(images, train=train)
        return encoded.tokens, encoded.mask
