"""Captioners: an image tower and a decoder that describes the picture (Tschannen et al. 2023, "Cap" and "CapPa")."""

from typing import ClassVar

import flax.linen as nn

from vlm_jax.models.decoder import WRITING, Conditional
from vlm_jax.models.subset import of_keys, subset, take


def _shown(o):
    """Returns what the decoder sees of a picture, (tokens [B, N, D], mask or None): in training, a share `keep`."""
    tokens, mask = o["seen"]
    if o.model.keep == 1 or not o.train:
        return tokens, mask
    kept, real = subset(of_keys(o.keys, tokens.shape[1]), o.model.keep, mask)
    return take(tokens, kept), real


class Captioner(Conditional, kw_only=True):
    """An image tower, and a decoder that reads the tower's tokens through cross-attention.

    "Image Captioners Are Scalable Vision Learners Too" (arXiv:2306.07915), section 3. The inputs are images, floating
    [B, H, W, 3].

    Attributes:
      image: the image tower, without pool and head; its normalised tokens are the context.
      decoder: `Decoder`.
      keep: share of the tower's tokens that the decoder sees in training, drawn anew for each picture and step
        (OpenVision 2: arXiv:2509.01644, section 2.2); 1 keeps all. The tower sees all patches; evaluation shows all.
    """

    image: nn.Module
    keep: float = 1.0
    can: ClassVar = frozenset({"describe"})

    outputs: ClassVar = WRITING | {
        "seen": lambda o: o.apply("see", o["image"]),
        "context": _shown,
        "image_tokens": lambda o: o["seen"][0],
    }

    def see(self, images, *, train=False):
        """Images -> (tokens of the tower [B, N, D], their mask bool [B, N] or None)."""
        encoded = self.image(images, train=train)
        return encoded.tokens, encoded.mask

    def encode(self, images, *, train=False):
        """Images -> (context [B, N, D], its mask bool [B, N] or None)."""
        return self.see(images, train=train)
