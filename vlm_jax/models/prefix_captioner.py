"""Captioners whose decoder reads the picture's tokens and the text as one sequence (OpenVision 2; AIMv2)."""

from typing import ClassVar

import jax.numpy as jnp

from vlm_jax.models.captioner import Captioner
from vlm_jax.models.layers import Dense
from vlm_jax.models.prefix_lm import Prefixed


class PrefixCaptioner(Prefixed, Captioner, kw_only=True):
    """An image tower, and a decoder without cross-attention, before whose text the tower's projected tokens stand.

    "OpenVision 2" (arXiv:2509.01644), section 2.2. The position table counts texts alone.

    Attributes:
      two_way: see `Prefixed`; the released code of OpenVision 2 is causal throughout.
      Others: see `Captioner`.
    """

    two_way: bool = False
    can: ClassVar = frozenset({"describe"})
    outputs: ClassVar = Captioner.outputs

    def setup(self):
        super().setup()
        self.projection = Dense(self.decoder.width, use_bias=False, dtype=self.decoder.dtype)

    def encode(self, images, *, train=False):
        """Images -> (context [B, N, D], its mask bool [B, N])."""
        tokens, mask = self.see(images, train=train)
        return tokens, jnp.ones(tokens.shape[:2], bool) if mask is None else mask

    def sequence(self, token_ids, context, **options):
        """Returns `Decoded` of the projected context, if any, and of token_ids [B, L]; options of `Decoder`."""
        prefix = None if context is None else self.projection(context)
        return self.decoder(token_ids, prefix=prefix, **options)
