"""The decoder: a transformer that predicts a text token by token, and may read a context through cross-attention."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.errors import UserError
from vlm_jax.models import positions
from vlm_jax.models.transformer import Around, Encoder


class Decoded(NamedTuple):
    """What a decoder returns.

    Attributes:
      hidden: [B, L, D] after the final norm; the model's `logits` makes logits of it.
      caches: what the next step gets, or None.
    """

    hidden: Any
    caches: Any


class Decoder(Encoder, kw_only=True):
    """Token ids -> blocks, causal, with cross-attention to a context -> hidden states.

    Attributes:
      vocab_size: V, of what it predicts.
      length: of the position table: the longest text.
      start_id: what stands before the first token in the input.
      mask_token: whether the input has one more id than the output, V, which stands for "not shown" (CapPa).
      cross: where blocks have cross-attention: "inside", "after" (see `transformer.Block`) or None.
      posemb: "learned" or "none".
      embed_std: standard deviation of the token embeddings at init.
      logits_bias: whether the logits have a bias.
      Others: see `Encoder`; there is no pool.
    """

    vocab_size: int
    length: int
    start_id: int = 0
    mask_token: bool = False
    cross: str | None = "inside"
    posemb: str = "learned"
    embed_std: float = 1.0
    logits_bias: bool = True
    pool: str = "none"

    @property
    def mask_id(self):
        """The id of the mask token."""
        if not self.mask_token:
            raise UserError("this decoder has no mask token; set config.model.decoder.mask_token=True")
        return self.vocab_size

    @nn.compact
    def __call__(
        self,
        token_ids,
        context=None,
        *,
        context_mask=None,
        bidirectional=None,
        caches=None,
        position=None,
        train=False,
    ):
        """Runs the decoder on token ids.

        Args:
          token_ids: inputs, integers [B, L]: the targets shifted right, or whatever stands in for them.
          context: [B, Lc, Dc], or None without cross-attention, and after the first step with caches.
          context_mask: bool [B, Lc], False where context is padding, or None.
          bidirectional: bool [B, L], inputs that all positions see; others are seen from their own position on. None:
            no such input.
          caches: what `new_caches` or the last step returned: the L tokens stand at `position` of a longer text, and
            attend to what came before.
          position: integer scalar, with caches.
          train: whether dropout and drop path are active (they draw from the rng `dropout`).

        Returns:
          `Decoded`.
        """
        if token_ids.ndim != 2 or token_ids.shape[1] > self.length or not jnp.issubdtype(token_ids.dtype, jnp.integer):
            raise UserError(
                f"token_ids should be integers [B, L] with L <= {self.length}, the decoder's `length`; got "
                f"{token_ids.dtype} {list(token_ids.shape)}: tokenize({self.length}) in the data ops, or change length"
            )
        embed = nn.Embed(
            self.vocab_size + self.mask_token,
            self.width,
            embedding_init=nn.initializers.normal(self.embed_std),
            dtype=self.dtype,
            name="token_embed",
        )
        x = embed(token_ids)
        if self.posemb == "learned":
            table = positions.learned(self, self.length, self.width)
            x = x + jax.lax.dynamic_slice_in_dim(table, 0 if position is None else position, x.shape[1], axis=1).astype(
                self.dtype
            )
        elif self.posemb != "none":
            raise UserError(f"posemb of a decoder is `{self.posemb}`; expected one of: learned, none")
        return self.run(x, context, context_mask, bidirectional, caches, position, train)

    def run(self, x, context, context_mask, bidirectional, caches, position, train, norm=True):
        """The blocks on tokens [B, L, D]; called from a compact method. Others as in `__call__` and `stack`."""
        first = 0 if position is None else position
        mask = None
        if caches is not None or bidirectional is not None:
            room = x.shape[1] if caches is None else jax.tree.leaves(caches)[0].shape[-3]
            mask = (jnp.arange(room) <= first + jnp.arange(x.shape[1])[:, None])[None, None]
            if bidirectional is not None:
                mask = mask | bidirectional[:, None, None, :]
        context_mask = None if context_mask is None else context_mask[:, None, None, :]
        around = Around(mask, context, context_mask, None if caches is None else first)
        options = dict(caches=caches, causal=mask is None, cross=self.cross, train=train, norm=norm)
        return Decoded(*self.stack(x, around, **options))


class Logits(nn.Module):
    """hidden [..., D] -> logits fp32 [..., V]; the kernel starts at zero: a uniform distribution."""

    vocab_size: int
    bias: bool

    @nn.compact
    def __call__(self, hidden):
        kernel = self.param("kernel", nn.initializers.zeros, (hidden.shape[-1], self.vocab_size))
        logits = jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
        return logits + self.param("bias", nn.initializers.zeros, (self.vocab_size,)) if self.bias else logits


def shift_right(token_ids, start_id=0):
    """[B, L] -> [B, L]: what a decoder sees while it predicts these: the start token, and all but the last of them."""
    return jnp.pad(token_ids[:, :-1], ((0, 0), (1, 0)), constant_values=start_id)
