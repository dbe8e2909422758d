"""The text tower."""

import flax.linen as nn
import jax.numpy as jnp

from vlm_jax.errors import UserError
from vlm_jax.models import positions
from vlm_jax.models.transformer import Encoder
from vlm_jax.params.sharding import look_up


class TextTransformer(Encoder, kw_only=True):
    """Token ids -> blocks -> pool -> head.

    CLIP (Radford et al. 2021): causal, pool "argmax" or "eos", head without bias. LiT and SigLIP (Zhai et al. 2022,
    2023): bidirectional, no padding mask, pool "last", head with bias. BERT (Devlin et al. 2018): post_norm, pre_norm,
    pad_mask, token_types 2. RoBERTa (Liu et al. 2019): as BERT, posemb "counted", pad_id 1, token_types 1.

    Attributes:
      vocab_size: V.
      length: the longest text: rows of the position table.
      pool: "last", "first", "eos" (the first eos_id), "argmax" (the largest id), "mean", "max", "map", "concat" or
        "none".
      causal: whether a token sees earlier tokens only.
      posemb: "learned"; "counted", learned: token i has row pad_id + (number of tokens up to i that are no padding),
        and padding row pad_id (RoBERTa); or "none".
      pad_id: the id of padding, for pad_mask and posemb "counted".
      pad_mask: whether attention and the pool ignore padding.
      eos_id: the id that pool "eos" looks for.
      pool_exclude: ids left out of the pools "mean", "max", "map" and "concat", e.g. BOS and EOS; attention sees these
        ids.
      embed_std: standard deviation of the token embeddings at init; defaults to D ** -0.5.
      pre_norm: whether a norm follows the positions.
      last_norm: with post_norm, whether a norm follows the blocks (AltCLIP); towers without post_norm always have one.
      token_types: rows of the token type table (BERT: 2); every token gets the first row. 0 for no table.
      Others: see `Encoder`.
    """

    vocab_size: int
    length: int
    pool: str = "last"
    causal: bool = False
    posemb: str = "learned"
    pad_id: int = 0
    pad_mask: bool = False
    eos_id: int | None = None
    pool_exclude: tuple[int, ...] = ()
    embed_std: float | None = None
    pre_norm: bool = False
    last_norm: bool = False
    token_types: int = 0

    @nn.compact
    def __call__(self, token_ids, *, context=None, context_mask=None, layers=(), train=False):
        """Encodes texts.

        Args:
          token_ids: integers [B, L], L <= length.
          context, context_mask, layers: see `Encoder.encode`.
          train: whether dropout and drop path are active.

        Returns:
          `Encoded`.
        """
        self._check(token_ids)
        std = self.width**-0.5 if self.embed_std is None else self.embed_std
        embed = nn.Embed(
            self.vocab_size,
            self.width,
            embedding_init=nn.initializers.normal(std),
            dtype=self.dtype,
            name="token_embed",
        )
        x = look_up(embed, token_ids)
        if self.posemb == "learned":
            x = x + positions.learned(self, self.length, self.width)[:, : x.shape[1]].astype(self.dtype)
        elif self.posemb == "counted":
            real = token_ids != self.pad_id
            table = positions.learned(self, self.length + self.pad_id + 1, self.width)[0]
            x = x + table.astype(self.dtype)[self.pad_id + jnp.cumsum(real, axis=1) * real]
        elif self.posemb != "none":
            raise UserError(f"posemb of a text tower is `{self.posemb}`; expected one of: learned, counted, none")
        if self.token_types:
            table = self.param("token_type_embed", nn.initializers.normal(std), (self.token_types, self.width))
            x = x + table[0].astype(self.dtype)
        if self.pre_norm:
            x = self.new_norm("pre_norm")(x)
        mask = token_ids != self.pad_id if self.pad_mask else None
        options = dict(context=context, context_mask=context_mask, layers=layers, train=train)
        x, _, aux = self.encode(x, mask=mask, causal=self.causal, **options)
        if self.last_norm and self.post_norm is True:
            x = self.new_norm("norm")(x)
        pool_mask = mask
        if self.pool_exclude:
            kept = ~jnp.isin(token_ids, jnp.asarray(self.pool_exclude))
            pool_mask = kept if mask is None else kept & mask
        position = None
        if self.pool == "argmax":
            position = jnp.argmax(token_ids, axis=-1)
        elif self.pool == "eos":
            position = jnp.argmax(token_ids == self.eos_id, axis=-1)  # the first one; 0 without any
        return self.summarise(x, mask=mask, pool_mask=pool_mask, position=position).replace(aux=aux)

    def _check(self, token_ids):
        if self.pool == "eos" and self.eos_id is None:
            raise UserError('pool "eos" of a text tower needs eos_id; set it to the tokenizer\'s')
        if token_ids.ndim != 2 or token_ids.shape[1] > self.length:
            raise UserError(
                f"token_ids should be [B, L] with L <= {self.length}, the text tower's `length`; got "
                f"{list(token_ids.shape)}: tokenize({self.length}) in the data ops, or change `length`"
            )
        if not jnp.issubdtype(token_ids.dtype, jnp.integer):
            raise UserError(f"token_ids should be integers; got {token_ids.dtype}")
