"""Texts to texts: T5 (Raffel et al. 2020, arXiv:1910.10683), T5 v1.1 and UL2 (Tay et al. 2022, arXiv:2205.05131)."""

import flax.linen as nn

from vlm_jax.models.decoder import Conditional, shift_right
from vlm_jax.models.transformer import Encoder

# What a T5 is beside its sizes: norms and matrices without biases, logits of attention unscaled, and one table of
# relative positions for all blocks. T5 v1.1 and UL2 have gated MLPs and logits with a matrix of their own.
T5 = dict(norm="rmsnorm", attn_bias=False, mlp_bias=False, attn_scale=1.0, relative_buckets=32, gated=True)
T5_DECODER = dict(T5, posemb="none", logits_bias=False)


class TokenEncoder(Encoder, kw_only=True):
    """Blocks that see both ways and the final norm, on tokens that are vectors. Attributes: see `Encoder`."""

    pool: str = "none"

    @nn.compact
    def __call__(self, x, mask=None, *, train=False):
        """[B, L, D], bool [B, L] or [B, L, L] or None -> [B, L, D]; see `Encoder.encode`."""
        return self.encode(x, mask=mask, train=train)


class EncoderDecoder(Conditional, kw_only=True):
    """An encoder of a text and a decoder that reads it through cross-attention; both use the decoder's token table.

    The inputs are token ids, integers [B, L].

    Attributes:
      encoder: `TokenEncoder`.
      decoder: `Decoder`.
      pad_id: of inputs, hidden from all.
    """

    encoder: nn.Module
    pad_id: int = 0

    def __call__(self, input_ids, target_ids, *, segments=None, train=False):
        """Logits fp32 [B, L, V] of target_ids [B, L], each given input_ids [B, Li] and the targets before it.

        segments: packed texts: integers ([B, Li], [B, L]), to which text of its row a token belongs; padding is of a
        text that has no other tokens. Tokens see tokens of their own text. None: a row is a text.
        """
        shown = shift_right(target_ids, self.decoder.start_id, None if segments is None else segments[1])
        return self.logits(self.hidden(input_ids, shown, segments=segments, train=train))

    def hidden(self, inputs, input_ids, *, bidirectional=None, segments=None, train=False):
        """As in `Conditional`; segments as in `__call__`."""
        if segments is None:
            return super().hidden(inputs, input_ids, bidirectional=bidirectional, train=train)
        of_inputs, of_targets = segments
        context, seen = self.encode(inputs, of_inputs, train=train)
        options = dict(context_mask=_same(of_targets, of_inputs) & seen[:, None], mask=_same(of_targets, of_targets))
        return self.decode(input_ids, context, bidirectional=bidirectional, train=train, **options).hidden

    def encode(self, input_ids, segment_ids=None, *, train=False):
        """Token ids [B, L] -> (context [B, L, D], its mask bool [B, L])."""
        seen = input_ids != self.pad_id
        mask = seen if segment_ids is None else _same(segment_ids, segment_ids) & seen[:, None]
        return self.encoder(self.decoder.embed(input_ids), mask, train=train), seen


def _same(queries, keys):
    """bool [B, Lq, Lk], which are of one segment."""
    return queries[:, :, None] == keys[:, None]
