"""Text to text: T5 (Raffel et al. 2020, arXiv:1910.10683), T5 v1.1 and UL2 (Tay et al. 2022, arXiv:2205.05131)."""

from typing import ClassVar

import flax.linen as nn

from vlm_jax.models.decoder import WRITING, Conditional, shift_right
from vlm_jax.models.transformer import Encoder

# T5's fields without sizes: norms and matrices have no biases, attention logits are unscaled, and all blocks share one
# table of relative positions. T5 v1.1 and UL2 have gated MLPs and a separate matrix for logits.
T5 = dict(norm="rmsnorm", attn_bias=False, mlp_bias=False, attn_scale=1.0, relative_buckets=32, gated=True)
T5_DECODER = dict(T5, posemb="none", logits_bias=False)


class TokenEncoder(Encoder, kw_only=True):
    """Bidirectional blocks and the final norm, on embedded tokens. Attributes: see `Encoder`."""

    pool: str = "none"

    @nn.compact
    def __call__(self, x, mask=None, *, train=False):
        """[B, L, D], bool [B, L] or [B, L, L] or None -> [B, L, D]; see `Encoder.encode`."""
        return self.encode(x, mask=mask, train=train).tokens


class EncoderDecoder(Conditional, kw_only=True):
    """A text encoder and a decoder with cross-attention to the encoded text; both use the decoder's token table.

    The inputs are token ids, integers [B, L].

    Attributes:
      encoder: `TokenEncoder`.
      decoder: `Decoder`.
      pad_id: id of padding in inputs; no token attends to padding.
    """

    encoder: nn.Module
    pad_id: int = 0
    can: ClassVar = frozenset({"write"})

    outputs: ClassVar = WRITING | {"context": lambda o: o.apply("encode", o["input_ids"])}

    def __call__(self, input_ids, target_ids, *, segments=None, train=False):
        """Returns logits fp32 [B, L, V] of target_ids [B, L], each given input_ids [B, Li] and all earlier targets.

        segments: for packed texts, integers ([B, Li], [B, L]): each token's text number within the row; padding has its
        own number. Tokens see only tokens of their own text. None: each row is one text.
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
    """Returns bool [B, Lq, Lk]: True where query and key are in one segment."""
    return queries[:, :, None] == keys[:, None]
