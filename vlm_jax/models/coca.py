"""CoCa: contrastive and captioning on one image tower (Yu et al. 2022, arXiv:2205.01917), as open_clip releases it."""

import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.models import positions
from vlm_jax.models.block import AttentionInputs, over_heads
from vlm_jax.models.decoder import Decoded, Decoder, Logits
from vlm_jax.models.layers import Attention, Norm
from vlm_jax.models.two_tower import EMBEDDINGS, Embeddings, unit


class QueryPool(nn.Module):
    """Attention of learned queries to tokens: the first output is the picture's vector, the others are its tokens.

    Section 3.2, "attentional pooler"; in open_clip one pooler serves both.

    Attributes:
      width: D, width of the queries.
      queries: number of queries.
      heads: attention heads.
      norm_eps: epsilon of the norms.
      dtype: dtype of the matmuls.
    """

    width: int
    queries: int = 256
    heads: int = 8
    norm_eps: float = 1e-5
    dtype: str = "float32"

    @nn.compact
    def __call__(self, tokens, mask=None):
        """[B, N, Dt], bool [B, N], False for padding, or None -> [B, queries, D]."""
        norm = lambda name: Norm("layernorm", self.norm_eps, dtype=self.dtype, name=name)
        queries = self.param("queries", nn.initializers.normal(1.0), (1, self.queries, self.width))
        queries = jnp.broadcast_to(norm("query_norm")(queries), (len(tokens), self.queries, self.width))
        pooled, _ = Attention(self.heads, dtype=self.dtype, name="attn")(queries, tokens, over_heads(mask))
        return norm("norm")(pooled)


class UnimodalDecoder(Decoder, kw_only=True):
    """The text tower: causal, without the picture, with a cls token at the end that sees the whole text.

    Attributes:
      pad_id: id of padding; the cls token does not attend to padding.
      Others: see `Decoder`. The position table has one more row than `length`, for the cls token.
    """

    pad_id: int = 0
    cross: str | None = None

    @nn.compact
    def __call__(self, token_ids, *, caches=None, position=None, layers=(), train=False):
        """Token ids [B, L] -> (`Decoded` before the final norm, cls token [B, D] after the norm; None with caches)."""
        x, table = self.embed(token_ids), positions.learned(self, self.length + 1, self.width).astype(self.dtype)
        cls = self.param("cls", nn.initializers.normal(0.01), (1, 1, self.width)).astype(self.dtype)
        norm = self.new_norm("norm")
        if caches is not None:
            x = x + jax.lax.dynamic_slice_in_dim(table, position, x.shape[1], axis=1)
            return self.run(x, None, None, None, caches, position, train, norm=False), None
        x = jnp.concatenate([x, jnp.broadcast_to(cls, (len(x), 1, self.width))], axis=1)
        x = x + table[:, : x.shape[1]]
        # The released models shift the padding mask by one token to the right: the cls token sees position j + 1 if
        # text token j is no padding.
        last = jnp.pad(token_ids != self.pad_id, ((0, 0), (1, 0)), constant_values=True)
        causal = jnp.tril(jnp.ones((x.shape[1],) * 2, bool))
        seen = causal & jnp.where(jnp.arange(x.shape[1])[:, None] == x.shape[1] - 1, last[:, None], True)
        hidden, _, aux = self.stack(x, AttentionInputs(seen[:, None]), layers=layers, train=train, norm=False)
        return Decoded(hidden[:, :-1], None, aux), norm(hidden[:, -1])


class MultimodalDecoder(Decoder, kw_only=True):
    """The decoder: hidden states of the text tower -> hidden states conditioned on the picture."""

    cross: str | None = "after"

    @nn.compact
    def __call__(self, x, context=None, *, caches=None, position=None, train=False):
        """[B, L, D], context [B, Lc, D] -> `Decoded`; see `Decoder`."""
        return self.run(x, context, None, None, caches, position, train)


class CoCa(nn.Module):
    """Attributes:
    image: the image tower, without pool and head; its final norm normalises the pooler's keys.
    pool: `QueryPool`.
    text: `UnimodalDecoder`; texts begin with its `start_id`.
    decoder: `MultimodalDecoder`.
    out_dim: width of the embeddings.
    scale_init: initial factor on cosines (stored as its log, `logit_scale`).
    """

    image: nn.Module
    pool: nn.Module
    text: nn.Module
    decoder: nn.Module
    out_dim: int
    scale_init: float = 1 / 0.07
    can: ClassVar = frozenset({"embed", "describe"})

    outputs: ClassVar = EMBEDDINGS | {
        # texts begin with the start token: (hidden states of all tokens but the last, the tokens after them)
        "next_token": lambda o: (
            o.apply("describe", o["image_tokens"], o["text_tokens"][:, :-1]),
            o["token_ids"][:, 1:],
        ),
    }

    def setup(self):
        head = lambda name: nn.Dense(self.out_dim, use_bias=False, dtype=self.decoder.dtype, name=name)
        self.image_head, self.text_head = head("image_head"), head("text_head")
        self.head = Logits(self.decoder.vocab_size, self.decoder.logits_bias)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(math.log(self.scale_init)), ())

    def __call__(self, images, token_ids, *, train=False):
        """Returns `Embeddings` of images [B, H, W, 3] and texts [B, L] with a start token; either may be None."""
        image = text = image_tokens = text_tokens = None
        if images is not None:
            pooled, image_tokens = self._pooled(images, train)
            image = unit(self.image_head(pooled))
        if token_ids is not None:
            decoded, cls = self.text(token_ids, train=train)
            text, text_tokens = unit(self.text_head(cls)), decoded.hidden
        if self.is_initializing():
            self.logits(self.describe(image_tokens, text_tokens))
        return Embeddings(image, text, image_tokens, text_tokens, jnp.exp(self.logit_scale), None)

    def describe(self, image_tokens, text_tokens, *, train=False):
        """Returns the hidden states [B, L, D] for `logits` of the next tokens, from the tokens of `Embeddings`."""
        return self.decoder(text_tokens, image_tokens, train=train).hidden

    def hidden(self, images, input_ids, *, train=False):
        """As in `Captioner`."""
        return self.describe(self._pooled(images, train)[1], self.text(input_ids, train=train)[0].hidden, train=train)

    def encode(self, images, *, train=False):
        """Images -> (context [B, N, D], None)."""
        return self._pooled(images, train)[1], None

    def decode(self, token_ids, context=None, *, context_mask=None, caches=None, position=None):
        """Returns `Decoded` of token ids [B, L]: one or more steps."""
        del context_mask
        of_text, of_decoder = (None, None) if caches is None else caches
        decoded, _ = self.text(token_ids, caches=of_text, position=position)
        described = self.decoder(decoded.hidden, context, caches=of_decoder, position=position)
        return Decoded(described.hidden, (decoded.caches, described.caches))

    @nn.nowrap
    def new_caches(self, batch, length):
        """Returns empty caches for `decode`."""
        return self.text.new_caches(batch, length), self.decoder.new_caches(batch, length)

    def logits(self, hidden):
        """Returns the logits of hidden states, fp32 [..., V]."""
        return self.head(hidden)

    def _pooled(self, images, train):
        encoded = self.image(images, train=train)
        pooled = self.pool(encoded.tokens, encoded.mask)
        return pooled[:, 0], pooled[:, 1:]
