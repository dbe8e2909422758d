"""One block of the transformer, and the state and inputs that it has besides its tokens.

Residual blocks (Vaswani et al. 2017), norms before the branches (Dosovitskiy et al. 2020) or after them (BERT). Fields
cover the differences between released models.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.models.fields import Fields
from vlm_jax.models.layers import Attention, KeyValues, Mlp, Norm
from vlm_jax.params.sharding import split_batch


class Cache(NamedTuple):
    """A block's state while decoding.

    Attributes:
      attn: `KeyValues` of the tokens so far, with room for later tokens.
      cross_attn: `KeyValues` of the context; None before the first step, and without cross-attention.
    """

    attn: KeyValues
    cross_attn: KeyValues | None = None


class AttentionInputs(NamedTuple):
    """Inputs of attention besides the tokens, the same for all blocks.

    Attributes:
      mask: bool [B | 1, 1, L | 1, Lk], True where a token sees a key, or None.
      context: [B, Lc, Dc], input of cross-attention; None without cross-attention, and if the caches hold the context.
      context_mask: bool [B, 1, 1, Lc], False where context is padding, or None.
      position: integer scalar, the tokens' place in the caches; None without caches.
      bias: [1, heads, L, Lk], added to the logits of self-attention, or None; `Encoder.stack` makes it.
      real: bool [B, L], False for tokens that statistics leave out, or None.
      rotation: `rotary.Rotation` of the last tokens, in self-attention; or None.
    """

    mask: Any = None
    context: Any = None
    context_mask: Any = None
    position: Any = None
    bias: Any = None
    real: Any = None
    rotation: Any = None


class BlockResult(NamedTuple):
    """What a block returns besides its tokens; a scan stacks it.

    Attributes:
      cache: `Cache`, or None.
      statistics: of the block's MLP, name -> [B, ...]; row i is of example i alone.
      tokens: the block's output [B, L, D] if it is kept, or None.
    """

    cache: Any
    statistics: Mapping[str, jax.Array]
    tokens: Any


def over_heads(mask):
    """Adds the axis of heads to a mask: bool [B, Lk] or [B, L, Lk] -> [B, 1, 1 | L, Lk]; None stays None."""
    if mask is None:
        return None
    return mask[:, None, None] if mask.ndim == 2 else mask[:, None]


def room(caches):
    """Returns the number of tokens that caches, one or several, have room for."""
    return jax.tree.leaves(caches)[0].shape[-3]


class Block(Fields, kw_only=True):
    """x + attn(norm1(x)), then x + mlp(norm2(x)); optional layer scale, dropout and drop path on each branch.

    With cross "inside", x + cross_attn(cross_norm(x), context) stands between the two (Vaswani et al. 2017). With
    "after", cross-attention follows them, reads context_norm(context) and has its own MLP (CoCa). Both are left out if
    no context is given. With post_norm: norm1(x + attn(x)), then norm2(x + mlp(x)); with post_norm "branch":
    x + norm1(attn(x)), then x + norm2(mlp(x)).

    Attributes:
      depth: number of blocks in the stack.
      causal: whether token i sees tokens 0..i only.
      train: whether dropout and drop path are active.
      keep: whether `BlockResult` has the output.
      Others: see `Fields`.
    """

    depth: int
    causal: bool
    train: bool
    keep: bool

    @nn.compact
    def __call__(self, x, around, layer, cache):
        """[B, L, D], `AttentionInputs`, the layer's number from 0, `Cache` or None -> [B, L, D], `BlockResult`."""
        drop_path = self.drop_path * layer / max(self.depth - 1, 1)
        norm = functools.partial(Norm, self.norm, self.norm_eps, self.norm_bias, self.dtype)
        of_attention = dict(
            scale=self.attn_scale,
            qk_norm=norm if self.qk_norm else None,
            out_norm=norm if self.attn_norm else None,
        )
        attention = functools.partial(Attention, self.heads, self.head_dim, self.attn_bias, **of_attention)
        attn = attention(self.causal, self.implementation, self.dtype, gate=self.attn_gate, name="attn")
        width = self.mlp_dim or 4 * x.shape[-1]
        of_mlp = dict(
            width=width, activation=self.activation, gated=self.gated, bias=self.mlp_bias,
            dropout=self.dropout, train=self.train, dtype=self.dtype, **({"norm": norm} if self.mlp_norm else {}),
        )  # fmt: skip
        own, read = (None, None) if cache is None else cache
        has_context = around.context is not None or read is not None

        def residual(x, name, norm, branch):
            """Returns the sum, and the branch's second result."""
            y, other = branch(x if self.post_norm else norm(x))
            x = x + self._branch(name, norm(y) if self.post_norm == "branch" else y, drop_path)
            return norm(x) if self.post_norm is True else x, other

        self_attn = lambda x: attn(
            x, mask=around.mask, logits_bias=around.bias, cache=own, position=around.position, rotation=around.rotation
        )

        def mlp(x):
            if self.mlp is None:
                return Mlp(**of_mlp, name="mlp")(x), {}
            return self.mlp(**of_mlp, name="mlp")(x, around.real)

        def cross_attn(x):
            context = around.context
            if self.cross == "after" and context is not None:
                context = norm(name="context_norm")(context)
            cross = attention(False, self.implementation, self.dtype, name="cross_attn")
            return cross(x, context, around.context_mask, cache=read)

        x, own = residual(x, "1", norm(name="norm1"), self_attn)
        if self.cross == "inside" and has_context:
            x, read = residual(x, "_cross", norm(name="cross_norm"), cross_attn)
        x, statistics = residual(x, "2", norm(name="norm2"), mlp)
        if self.cross == "after" and has_context:
            x, read = residual(x, "_cross", norm(name="cross_norm"), cross_attn)
            cross_mlp = lambda x: (Mlp(**of_mlp, name="cross_mlp")(x), None)
            x, _ = residual(x, "_cross_mlp", norm(name="cross_mlp_norm"), cross_mlp)
        x = split_batch(x)
        return x, BlockResult(None if cache is None else Cache(own, read), statistics, x if self.keep else None)

    def _branch(self, name, y, drop_path):
        if self.layer_scale is not None:  # Touvron et al. 2021, CaiT, equation 4
            init = nn.initializers.constant(self.layer_scale)
            y = y * self.param(f"layer_scale{name}", init, y.shape[-1:]).astype(y.dtype)
        y = nn.Dropout(self.dropout)(y, deterministic=not self.train)
        if self.drop_path and self.train:  # Huang et al. 2016, per example
            keep = 1.0 - drop_path
            kept = jax.random.bernoulli(self.make_rng("dropout"), keep, (y.shape[0], 1, 1))
            y = jnp.where(kept, y / keep, 0).astype(y.dtype)
        return y
