"""Captioners: an image tower and a decoder that describes what it saw (Tschannen et al. 2023, "Cap" and "CapPa")."""

import flax.linen as nn

from vlm_jax.models.decoder import Logits, shift_right


class Captioner(nn.Module):
    """An image tower and a decoder that reads its tokens through cross-attention.

    "Image Captioners Are Scalable Vision Learners Too" (arXiv:2306.07915), section 3.

    Attributes:
      image: the image tower, without pool and head: its normalised tokens are the context.
      decoder: `Decoder`.
    """

    image: nn.Module
    decoder: nn.Module

    def setup(self):
        self.head = Logits(self.decoder.vocab_size, self.decoder.logits_bias)

    def __call__(self, images, target_ids, *, train=False):
        """Logits fp32 [B, L, V] of target_ids [B, L], each given the picture [B, H, W, 3] and the targets before it."""
        return self.logits(self.hidden(images, shift_right(target_ids, self.decoder.start_id), train=train))

    def hidden(self, images, input_ids, *, bidirectional=None, train=False):
        """What the logits are made of [B, L, D], for inputs [B, L] as they are; see `Decoder`."""
        context, context_mask = self.encode(images, train=train)
        decoded = self.decoder(
            input_ids, context, context_mask=context_mask, bidirectional=bidirectional, train=train
        )  # fmt: skip
        return decoded.hidden

    def encode(self, images, *, train=False):
        """Images -> (context [B, N, D], its mask bool [B, N] or None)."""
        encoded = self.image(images, train=train)
        return encoded.tokens, encoded.mask

    def decode(self, token_ids, context=None, **options):
        """`Decoded` of token ids [B, L]: one or more steps; see `Decoder`."""
        return self.decoder(token_ids, context, **options)

    @nn.nowrap
    def new_caches(self, batch, length):
        """Empty caches for `decode`."""
        return self.decoder.new_caches(batch, length)

    def logits(self, hidden):
        """fp32 [..., V]."""
        return self.head(hidden)
