"""The transformer of all towers and decoders: the stack of blocks."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.config import choose
from vlm_jax.errors import UserError
from vlm_jax.models import positions
from vlm_jax.models.block import AttentionInputs, Block, Cache, over_heads, room
from vlm_jax.models.fields import Fields, shared
from vlm_jax.models.layers import ACTIVATIONS, KeyValues, Norm
from vlm_jax.models.pooling import Encoded, MapPool, pool
from vlm_jax.params.sharding import split_batch

REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Stacked(NamedTuple):
    """The result of a stack of blocks.

    Attributes:
      tokens: [B, L, D].
      caches: one `Cache` a block, or None.
      aux: see `Encoded`.
    """

    tokens: Any
    caches: Any
    aux: dict[str, Any]


class Encoder(Fields, kw_only=True):
    """The shared base of towers and decoders: the fields, the stack of blocks, and the final norm.

    Attributes:
      width: D, width of the tokens.
      depth: number of blocks.
      scan: whether the blocks are one `lax.scan`, with parameters stacked in `blocks` (leading layer axis).
      remat: a key of `REMAT`: the values that a block keeps for the backward pass ("none": all values).
      pool: the pool: "map" (attention with a learned query), a key of `pooling.POOLS`, or "none".
      pool_heads, pool_mlp_dim: of the pool "map"; default to those of the blocks.
      rep_dim: width of tanh(dense(pooled)) before the head (ViTs pretrained on ImageNet-21k); None for no such layer.
      rep_activation: "tanh", or a key of `layers.ACTIVATIONS` in its place, or "none".
      rep_bias: whether that layer has a bias.
      out_dim: width of the projection head; None for no head.
      head_bias: whether the head has a bias.
      context_width: Dc, width of the context that cross-attention reads; defaults to width. Only parameters made
        without a context depend on it.
      relative_buckets: rows of the table of relative positions that all blocks share (T5); 0 for no table.
      relative_distance: distances from here on share one row of the table.
      relative_two_way: whether keys ahead of the query have their own rows.
      Others: see `Fields`.
    """

    width: int
    depth: int
    scan: bool = False
    remat: str = "none"
    pool: str = "gap"
    pool_heads: int | None = None
    pool_mlp_dim: int | None = None
    rep_dim: int | None = None
    rep_activation: str = "tanh"
    rep_bias: bool = True
    out_dim: int | None = None
    head_bias: bool = True
    context_width: int | None = None
    relative_buckets: int = 0
    relative_distance: int = 128
    relative_two_way: bool = True
    trunk: nn.Module | None = None

    def project(self, x):
        """Projects [..., D] -> [..., out_dim]; called from the compact method."""
        return nn.Dense(self.out_dim, use_bias=self.head_bias, dtype=self.dtype, name="head")(x)

    def new_norm(self, name):
        """Returns a norm of this encoder's kind."""
        return Norm(self.norm, self.norm_eps, dtype=self.dtype, name=name)

    def encode(
        self, x, *, mask=None, causal=False, context=None, context_mask=None, rotation=None, layers=(), train=False,
        norm=True,
    ):  # fmt: skip
        """Runs dropout, the blocks and the final norm; called from the compact method of a tower.

        Args:
          x: tokens with positions [B, L, D].
          mask: bool [B, L], False for padding; or [B, L, L], True where token i sees token j; or None.
          causal: whether token i sees tokens 0..i only.
          context: [B, Lc, Dc] that cross-attention reads; None leaves cross-attention out.
          context_mask: bool [B, Lc], False for padding; or [B, L, Lc], True where token i sees context j; or None.
          rotation: `rotary.Rotation` of the last tokens, or None.
          layers: numbers of blocks whose outputs are returned, from 0; negative ones count from the end.
          train: whether dropout and drop path are active (they draw from the rng `dropout`).
          norm: whether the final norm follows.

        Returns:
          `Stacked`.
        """
        if context is not None and not self.cross:
            raise UserError('the tower got a context, but has no cross-attention; build it with cross="inside"')
        real = mask if self.mlp is not None and mask is not None and mask.ndim == 2 else None
        around = AttentionInputs(over_heads(mask), context, over_heads(context_mask), real=real, rotation=rotation)
        return self.stack(x, around, causal=causal, layers=layers, train=train, norm=norm)

    def stack(self, x, around, *, caches=None, causal=False, layers=(), train=False, norm=True):
        """Like `encode`, with the additional inputs of a decoder.

        Args:
          x, causal, layers, train: as for `encode`.
          around: `AttentionInputs`.
          caches: result of `new_caches` or of the last call, or None.
          norm: whether the final norm follows.

        Returns:
          `Stacked`.
        """
        if self.trunk is not None:
            return self.trunk(x, around, causal=causal, layers=layers, train=train, norm=norm)
        policy = choose(REMAT, self.remat, "remat")
        if self.cross not in (None, "inside", "after"):
            raise UserError(f"cross is `{self.cross}`; expected one of: inside, after, None")
        if self.post_norm not in (False, True, "branch"):
            raise UserError(f"post_norm is `{self.post_norm}`; expected one of: True, False, branch")
        chosen = [_number(layer, self.depth) for layer in layers]
        x = split_batch(nn.Dropout(self.dropout)(x.astype(self.dtype), deterministic=not train))
        if self.is_initializing() and self.cross and around.context is None:
            around = around._replace(context=jnp.zeros((len(x), 1, self.context_width or self.width), self.dtype))
        if self.relative_buckets:
            sizes = (self.relative_buckets, self.relative_distance, self.relative_two_way)
            keys = jnp.arange(x.shape[1] if caches is None else room(caches))
            queries = jnp.arange(x.shape[1]) + (0 if around.position is None else around.position)
            bias = positions.RelativeBias(self.heads, *sizes, name="relative")(keys - queries[:, None])
            around = around._replace(bias=bias[None])
        block = Block
        if self.remat != "none":
            block = nn.remat(block, prevent_cse=not self.scan, policy=policy)
        fields = dict(shared(self), depth=self.depth, causal=causal, train=train, keep=bool(chosen))
        if self.scan:
            scanned = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, 0, nn.broadcast if caches is None else 0),
                length=self.depth,
            )
            x, (caches, statistics, kept) = scanned(**fields, name="blocks")(x, around, jnp.arange(self.depth), caches)
            statistics = jax.tree.map(lambda rows: jnp.moveaxis(rows, 0, 1), statistics)
        else:
            results = []
            for i in range(self.depth):
                cache = None if caches is None else caches[i]
                x, result = block(**fields, name=f"blocks_{i}")(x, around, i, cache)
                results.append(result)
            own, statistics, kept = zip(*results, strict=True)
            caches = None if caches is None else list(own)
            statistics = jax.tree.map(lambda *rows: jnp.stack(rows, 1), *statistics)
        aux = dict(statistics, layers=tuple(kept[i] for i in chosen)) if chosen else dict(statistics)
        return Stacked(self.new_norm("norm")(x) if norm and self.post_norm is not True else x, caches, aux)

    def run(
        self,
        x,
        context=None,
        context_mask=None,
        bidirectional=None,
        caches=None,
        position=None,
        train=False,
        norm=True,
        mask=None,
        layers=(),
    ):
        """Runs the blocks on tokens that see those before them; call it from a compact method.

        Args:
          x: tokens with positions [B, L, D].
          context, context_mask, layers, train, norm: as for `encode`.
          bidirectional: bool [B, Lk], True for tokens that all others see; None: all False.
          caches: result of `new_caches` or of the last call, or None. The L tokens then stand at `position`.
          position: integer scalar, only with caches.
          mask: bool [B, Lk], False for padding; or [B, L, Lk], True where token i may see token j; or None. Lk is L, or
            the room of the caches.

        Returns:
          `Stacked`.
        """
        first = 0 if position is None else position
        seen = None
        if caches is not None or bidirectional is not None:
            keys = jnp.arange(x.shape[1] if caches is None else room(caches))
            seen = (keys <= first + jnp.arange(x.shape[1])[:, None])[None, None]
            if bidirectional is not None:
                seen = seen | over_heads(bidirectional)
        causal, mask = seen is None, over_heads(mask)
        if mask is not None:
            seen = mask if causal else mask & seen
        around = AttentionInputs(seen, context, over_heads(context_mask), None if caches is None else first)
        return self.stack(x, around, caches=caches, causal=causal, layers=layers, train=train, norm=norm)

    def new_caches(self, batch, length):
        """Returns empty caches for `stack`: a list of `Cache`, or, with scan, one `Cache` with a leading layer axis."""
        head_dim = self.head_dim or self.width // self.heads
        layers = (self.depth,) if self.scan else ()
        zeros = lambda: jnp.zeros((*layers, batch, length, self.heads, head_dim), self.dtype)
        new = lambda: Cache(KeyValues(zeros(), zeros()))
        return new() if self.scan else [new() for _ in range(self.depth)]

    def summarise(self, tokens, *, mask=None, pool_mask=None, position=None, norm=False):
        """Pools and projects encoded tokens; called from the compact method of a tower.

        Args:
          tokens: [B, L, D] of the result of `encode`.
          mask: bool [B, L], the mask given to `encode`, or None.
          pool_mask: bool [B, L], False for tokens left out of the pool, or None.
          position: int [B], index of the token for the pools "eos" and "argmax".
          norm: whether the final norm follows the pool.

        Returns:
          `Encoded`.
        """
        if self.pool == "none":
            if self.out_dim or self.rep_dim:
                raise UserError('pool "none" gives no vector for a head; leave out_dim and rep_dim unset')
            return Encoded(None, tokens, mask)
        if self.pool == "map":
            own = dict(heads=self.pool_heads or self.heads, mlp_dim=self.pool_mlp_dim or self.mlp_dim)
            x = MapPool(**shared(self) | own, name="map_pool")(tokens, pool_mask)
        else:
            x = pool(self.pool, tokens, pool_mask, position)
        if norm:
            x = self.new_norm("norm")(x)
        if self.rep_dim:
            act = choose({"tanh": jnp.tanh, "none": lambda x: x, **ACTIVATIONS}, self.rep_activation, "rep_activation")
            x = act(nn.Dense(self.rep_dim, use_bias=self.rep_bias, dtype=self.dtype, name="rep")(x))
        if self.out_dim:
            x = self.project(x) if self.trunk is None else self.trunk(x)
        if self.pool == "all":
            x = pool("all", x, pool_mask)  # heads' biases make left-out tokens nonzero
        return Encoded(x, tokens, mask)


class Trunk(Encoder, kw_only=True):
    """Blocks, final norm and head that two towers share; each keeps its embedding of inputs and its pool."""

    @nn.compact
    def __call__(self, x, around=None, **options):
        """Runs `stack`; without `around`, the head."""
        return self.project(x) if around is None else self.stack(x, around, **options)


def _number(layer, depth):
    """Returns a block's number from 0."""
    if not -depth <= layer < depth:
        raise UserError(f"layers asks for block {layer} of {depth}; expected 0 to {depth - 1}, or {-depth} to -1")
    return layer % depth
