"""The one transformer: the block, and the encoder that every tower is.

Residual blocks (Vaswani et al. 2017), norms before the branches (Dosovitskiy et al. 2020) or after them (BERT). What
released models differ in is a field.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.config import choose
from vlm_jax.errors import UserError
from vlm_jax.models.layers import Attention, Mlp, Norm
from vlm_jax.models.pooling import Encoded, MapPool, pool

REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Block(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)); each branch scaled, dropped out and dropped whole if asked for.

    With post_norm: norm1(x + attn(x)), then norm2(x + mlp(x)).

    Attributes: those of `Encoder`, and train: whether dropout and drop path are active.
    """

    heads: int
    mlp_dim: int
    head_dim: int | None
    activation: str
    gated: bool
    norm: str
    norm_eps: float
    norm_bias: bool
    post_norm: bool
    attn_bias: bool
    mlp_bias: bool
    causal: bool
    layer_scale: float | None
    dropout: float
    implementation: str | None
    dtype: str
    train: bool

    @nn.compact
    def __call__(self, x, mask, drop_path):
        """[B, L, D], mask as in `Attention`, drop_path: this layer's rate or None -> ([B, L, D], None)."""
        norm = functools.partial(Norm, self.norm, self.norm_eps, self.norm_bias, self.dtype)
        attn = Attention(
            self.heads, self.head_dim, self.attn_bias, self.causal, self.implementation, self.dtype, name="attn"
        )
        mlp = Mlp(
            self.mlp_dim, self.activation, self.gated, self.mlp_bias, self.dropout, self.train, self.dtype, name="mlp"
        )
        norm1, norm2 = norm(name="norm1"), norm(name="norm2")
        if self.post_norm:
            x = norm1(x + self._branch(1, attn(x, mask=mask), drop_path))
            x = norm2(x + self._branch(2, mlp(x), drop_path))
        else:
            x = x + self._branch(1, attn(norm1(x), mask=mask), drop_path)
            x = x + self._branch(2, mlp(norm2(x)), drop_path)
        return x, None

    def _branch(self, number, y, drop_path):
        if self.layer_scale is not None:  # Touvron et al. 2021, CaiT, equation 4
            init = nn.initializers.constant(self.layer_scale)
            y = y * self.param(f"layer_scale{number}", init, y.shape[-1:]).astype(y.dtype)
        y = nn.Dropout(self.dropout)(y, deterministic=not self.train)
        if drop_path is not None and self.train:  # Huang et al. 2016, per example
            keep = 1.0 - drop_path
            kept = jax.random.bernoulli(self.make_rng("dropout"), keep, (y.shape[0], 1, 1))
            y = jnp.where(kept, y / keep, 0).astype(y.dtype)
        return y


class Encoder(nn.Module, kw_only=True):
    """What an image and a text tower share: the fields, the stack of blocks, and the final norm.

    Attributes:
      width: D, of the tokens.
      depth: number of blocks.
      heads: attention heads.
      mlp_dim: hidden width of the MLP; None is 4 * width.
      head_dim: width of an attention head; None is width / heads.
      activation: a key of `ACTIVATIONS`.
      gated: gated MLP.
      norm: "layernorm" or "rmsnorm".
      norm_eps: its epsilon.
      norm_bias: whether the norms inside blocks have a bias (the final norm always has).
      post_norm: whether norms follow the branches (BERT); there is no final norm then.
      attn_bias: whether attention projections have biases.
      mlp_bias: whether MLP matrices have biases.
      layer_scale: initial value of a learned scale on each branch; None for none.
      dropout: rate after the positions, the MLP activation and each branch.
      drop_path: rate of the last block; grows linearly from 0 at the first.
      scan: whether the blocks are one `lax.scan`, parameters stacked in `blocks` with a leading layer axis.
      remat: a key of `REMAT`: what a block keeps for the backward pass ("none": everything).
      implementation: see `kernels.attention`.
      pool: how tokens become one vector: "map" (attention with a learned query), a key of `pooling.POOLS`, "none".
      rep_dim: width of tanh(dense(pooled)) before the head (ViTs pretrained on ImageNet-21k); None for none.
      out_dim: width of the projection head; None for none.
      head_bias: whether the head has a bias.
      dtype: compute dtype.
    """

    width: int
    depth: int
    heads: int
    mlp_dim: int | None = None
    head_dim: int | None = None
    activation: str = "gelu_tanh"
    gated: bool = False
    norm: str = "layernorm"
    norm_eps: float = 1e-6
    norm_bias: bool = True
    post_norm: bool = False
    attn_bias: bool = True
    mlp_bias: bool = True
    layer_scale: float | None = None
    dropout: float = 0.0
    drop_path: float = 0.0
    scan: bool = False
    remat: str = "none"
    implementation: str | None = None
    pool: str = "gap"
    rep_dim: int | None = None
    out_dim: int | None = None
    head_bias: bool = True
    dtype: str = "float32"

    def new_norm(self, name):
        """A norm of this encoder's kind."""
        return Norm(self.norm, self.norm_eps, dtype=self.dtype, name=name)

    def encode(self, x, *, mask=None, causal=False, train=False):
        """Runs dropout, the blocks and the final norm; called from the compact method of a tower.

        Args:
          x: tokens with positions [B, L, D].
          mask: bool [B, L], False where a token is padding, or None.
          causal: whether token i sees tokens 0..i only.
          train: whether dropout and drop path are active (they draw from the rng `dropout`).

        Returns:
          [B, L, D].
        """
        policy = choose(REMAT, self.remat, "remat")
        x = nn.Dropout(self.dropout)(x.astype(self.dtype), deterministic=not train)
        mask = None if mask is None else mask[:, None, None, :]
        block = Block
        if self.remat != "none":
            block = nn.remat(block, prevent_cse=not self.scan, policy=policy)
        new_block = functools.partial(
            block,
            heads=self.heads,
            mlp_dim=self.mlp_dim or 4 * self.width,
            head_dim=self.head_dim,
            activation=self.activation,
            gated=self.gated,
            norm=self.norm,
            norm_eps=self.norm_eps,
            norm_bias=self.norm_bias,
            post_norm=self.post_norm,
            attn_bias=self.attn_bias,
            mlp_bias=self.mlp_bias,
            causal=causal,
            layer_scale=self.layer_scale,
            dropout=self.dropout,
            implementation=self.implementation,
            dtype=self.dtype,
            train=train,
        )
        rates = jnp.linspace(0.0, self.drop_path, self.depth) if self.drop_path else None
        if self.scan:
            scanned = nn.scan(
                new_block.func,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, nn.broadcast if rates is None else 0),
                length=self.depth,
            )
            x, _ = scanned(**new_block.keywords, name="blocks")(x, mask, rates)
        else:
            for i in range(self.depth):
                x, _ = new_block(name=f"blocks_{i}")(x, mask, None if rates is None else rates[i])
        return x if self.post_norm else self.new_norm("norm")(x)

    def summarise(self, tokens, *, mask=None, pool_mask=None, position=None):
        """Pools and projects encoded tokens; called from the compact method of a tower.

        Args:
          tokens: [B, L, D], what `encode` returned.
          mask: bool [B, L], the mask given to `encode`, or None.
          pool_mask: bool [B, L], False where a token is left out of the pool, or None.
          position: int [B], the token that the pools "eos" and "argmax" take.

        Returns:
          `Encoded`.
        """
        if self.pool == "none":
            if self.out_dim or self.rep_dim:
                raise UserError('pool "none" gives no vector for a head; leave out_dim and rep_dim unset')
            return Encoded(None, tokens, mask)
        if self.pool == "map":
            x = MapPool(
                heads=self.heads,
                mlp_dim=self.mlp_dim or 4 * self.width,
                head_dim=self.head_dim,
                activation=self.activation,
                gated=self.gated,
                norm=self.norm,
                norm_eps=self.norm_eps,
                attn_bias=self.attn_bias,
                mlp_bias=self.mlp_bias,
                implementation=self.implementation,
                dtype=self.dtype,
                name="map_pool",
            )(tokens, pool_mask)
        else:
            x = pool(self.pool, tokens, pool_mask, position)
        if self.rep_dim:
            x = jnp.tanh(nn.Dense(self.rep_dim, dtype=self.dtype, name="rep")(x))
        if self.out_dim:
            x = nn.Dense(self.out_dim, use_bias=self.head_bias, dtype=self.dtype, name="head")(x)
        return Encoded(x, tokens, mask)
