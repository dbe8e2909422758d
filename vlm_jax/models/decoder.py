"""The decoder: a transformer that predicts a text token by token, optionally with cross-attention to a context."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.errors import UserError
from vlm_jax.models import positions
from vlm_jax.models.transformer import Encoder
from vlm_jax.params.sharding import look_up


class Decoded(NamedTuple):
    """The result of a decoder.

    Attributes:
      hidden: [B, L, D] after the final norm; input of the model's `logits`.
      caches: caches for the next step, or None.
      aux: statistics of the blocks, see `Encoded`; or None.
    """

    hidden: Any
    caches: Any
    aux: Any = None


class TokenTable(nn.Module, kw_only=True):
    """Token ids -> embeddings with positions; and the ids that stand for no token of a text.

    Attributes:
      width: D, width of the embeddings.
      vocab_size: V, number of predicted ids.
      length: rows of the position table: the longest text. Without a table texts may be longer.
      start_id: id before the first token of the input.
      mask_token: whether the input has one more id than the output: V, which stands for "not shown" (CapPa).
      posemb: "learned" or "none".
      embed_std: standard deviation of the token embeddings at init.
      logits_bias: whether the logits have a bias.
      tied_scale: factor on hidden states for logits tied to the token table (T5: width ** -0.5); None: the logits have
        their own matrix.
      dtype: compute dtype.
    """

    width: int
    vocab_size: int
    length: int
    start_id: int = 0
    mask_token: bool = False
    posemb: str = "learned"
    embed_std: float = 1.0
    logits_bias: bool = True
    tied_scale: float | None = None
    dtype: str = "float32"

    def setup(self):
        self.token_embed = nn.Embed(
            self.vocab_size + self.mask_token,
            self.width,
            embedding_init=nn.initializers.normal(self.embed_std),
            dtype=self.dtype,
        )

    @property
    def mask_id(self):
        """The id of the mask token; raises a UserError if the decoder has none."""
        if not self.mask_token:
            raise UserError("this decoder has no mask token; set config.model.decoder.mask_token=True")
        return self.vocab_size

    @nn.compact
    def __call__(self, token_ids, place=None):
        """As `placed`."""
        return self.placed(token_ids, place)

    def embed(self, token_ids):
        """Embeds token ids without positions: integers [B, L] -> [B, L, D]."""
        limit = self.length if self.posemb == "learned" else token_ids.shape[-1]
        if token_ids.ndim != 2 or token_ids.shape[1] > limit or not jnp.issubdtype(token_ids.dtype, jnp.integer):
            raise UserError(
                f"token_ids should be integers [B, L] with L <= {self.length}, the decoder's `length`; got "
                f"{token_ids.dtype} {list(token_ids.shape)}: tokenize({self.length}) in the data ops, or change length"
            )
        return look_up(self.token_embed, token_ids)

    def placed(self, token_ids, place=None):
        """Embeds token ids with positions, the first one at `place` (0): integers [B, L] -> [B, L, D]."""
        x = self.embed(token_ids)
        if self.posemb == "learned":
            table = positions.learned(self, self.length, self.width)
            return x + jax.lax.dynamic_slice_in_dim(table, 0 if place is None else place, x.shape[1], axis=1).astype(
                self.dtype
            )
        if self.posemb != "none":
            raise UserError(f"posemb of a decoder is `{self.posemb}`; expected one of: learned, none")
        return x

    def tied_logits(self, hidden):
        """Multiplies hidden states with the token table: hidden [..., D] -> logits fp32 [..., V]."""
        table = self.token_embed.embedding[: self.vocab_size].astype(hidden.dtype)
        return jnp.matmul(hidden * self.tied_scale, table.T, preferred_element_type=_at_least_fp32(hidden))


class Decoder(Encoder, TokenTable, kw_only=True):
    """Token ids -> blocks, causal, with cross-attention to a context -> hidden states.

    Attributes: see `TokenTable` and `Encoder`; a decoder has no pool.
    """

    cross: str | None = "inside"
    pool: str = "none"
    relative_two_way: bool = False

    @nn.compact
    def __call__(
        self,
        token_ids,
        context=None,
        *,
        context_mask=None,
        mask=None,
        bidirectional=None,
        prefix=None,
        caches=None,
        position=None,
        place=None,
        layers=(),
        train=False,
    ):
        """Runs the decoder on token ids.

        Args:
          token_ids: inputs, integers [B, L]: the targets shifted right, or their corruption.
          context: [B, Lc, Dc]; None without cross-attention, and after the first step with caches.
          context_mask: bool [B, Lc], False for padding; or [B, L, Lc], True where token i sees context j; or None.
          mask: bool [B, Lk], False for padding; or [B, L, Lk], True where token i may see token j; or None. Lk is L, or
            the room of the caches.
          bidirectional: bool [B, Lk], True for inputs that all positions see; others are visible from their own
            position on. None: all False.
          prefix: [B, P, D], embedded tokens that stand before the text, part of the L tokens of masks and result; the
            position table does not count them. None after the first step with caches.
          caches: result of `new_caches` or of the last step. The L tokens then stand at `position` of a longer text
            and attend to all earlier tokens.
          position: integer scalar, only with caches.
          place: integer scalar, the first token's row in the position table; defaults to `position`.
          layers: numbers of blocks whose outputs are returned, see `Encoder.encode`.
          train: whether dropout and drop path are active (they draw from the rng `dropout`).

        Returns:
          `Decoded`.
        """
        x = self.placed(token_ids, position if place is None else place)
        if prefix is not None:
            x = jnp.concatenate([prefix.astype(x.dtype), x], axis=1)
        return self.run(x, context, context_mask, bidirectional, caches, position, train, mask=mask, layers=layers)

    def run(self, *args, **options):
        """As in `Encoder`, but returns `Decoded`."""
        return Decoded(*super().run(*args, **options))


class Logits(nn.Module):
    """hidden [..., D] -> logits fp32 [..., V]; the kernel starts at zero: a uniform distribution."""

    vocab_size: int
    bias: bool

    @nn.compact
    def __call__(self, hidden):
        kernel = self.param("kernel", nn.initializers.zeros, (hidden.shape[-1], self.vocab_size))
        logits = jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=_at_least_fp32(hidden))
        return logits + self.param("bias", nn.initializers.zeros, (self.vocab_size,)) if self.bias else logits


def _next_token(o):
    """(hidden states that predict the targets, each from all targets before; the targets)."""
    (context, mask), targets = o["context"], o["token_ids"]
    inputs = shift_right(targets, o.model.decoder.start_id)
    return o.apply("decode", inputs, context, context_mask=mask).hidden, targets


WRITING = {"next_token": _next_token}
"""The outputs of every `Conditional`; each class adds `context`, the result of its `encode`."""


class Conditional(nn.Module):
    """p(text | input): a decoder and its logits.

    Subclasses define `encode`, which maps inputs to a context. `generate` and the captioning objective use only this
    interface.

    Attributes:
      decoder: `Decoder`.
    """

    decoder: nn.Module

    def setup(self):
        self.head = Logits(self.decoder.vocab_size, self.decoder.logits_bias)

    def __call__(self, inputs, target_ids, *, train=False):
        """Returns logits fp32 [B, L, V] of target_ids [B, L], each given the input and all earlier targets."""
        return self.logits(self.hidden(inputs, shift_right(target_ids, self.decoder.start_id), train=train))

    def hidden(self, inputs, input_ids, *, bidirectional=None, train=False):
        """Returns the hidden states [B, L, D] for `logits`; input_ids [B, L] go to the decoder unchanged."""
        context, context_mask = self.encode(inputs, train=train)
        options = dict(context_mask=context_mask, bidirectional=bidirectional, train=train)
        return self.decode(input_ids, context, **options).hidden

    def decode(self, token_ids, context=None, *, train=False, **options):
        """Returns `Decoded` of token ids [B, L]: one or more steps; see `Decoder`."""
        return self.decoder(token_ids, context, train=train, **options)

    @nn.nowrap
    def new_caches(self, batch, length):
        """Returns empty caches for `decode`."""
        return self.decoder.new_caches(batch, length)

    def logits(self, hidden):
        """Returns the logits of hidden states, fp32 [..., V]."""
        return self.head(hidden) if self.decoder.tied_scale is None else self.decoder.tied_logits(hidden)


def _at_least_fp32(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def shift_right(token_ids, start_id=0, segment_ids=None):
    """Returns a decoder's inputs for targets [B, L]: the start token, then all targets but the last.

    With segment_ids, integers [B, L], every segment of a row begins with the start token.
    """
    shifted = jnp.pad(token_ids[:, :-1], ((0, 0), (1, 0)), constant_values=start_id)
    if segment_ids is None:
        return shifted
    begins = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.where(jnp.pad(begins, ((0, 0), (1, 0)), constant_values=True), start_id, shifted)
