"""Pools: tokens to one vector."""

from collections.abc import Callable
from typing import Any

import flax
import flax.linen as nn
import jax.numpy as jnp

from vlm_jax.errors import UserError
from vlm_jax.models.fields import Fields
from vlm_jax.models.layers import Attention, Mlp, Norm


@flax.struct.dataclass
class Encoded:
    """The result of a tower.

    Attributes:
      pooled: [B, out_dim] (without a head: the pool's width), compute dtype; [B, L, out_dim] for pool "all", zero
        for left-out tokens; None for pool "none".
      tokens: [B, L, D] after the final norm, before any head; a cls token comes first.
      mask: bool [B, L], False for padding that attention does not see; None if attention sees all tokens.
      aux: statistics of the blocks' MLPs, name -> [B, depth, ...], row i of example i alone, see `moe.Moe`; and
        "layers": the outputs of the blocks that were asked for, [B, L, D] each, before the final norm.
    """

    pooled: Any
    tokens: Any
    mask: Any
    aux: dict[str, Any] = flax.struct.field(default_factory=dict)


def pool(name, tokens, mask=None, position=None):
    """Pools tokens by a key of `POOLS`.

    Args:
      name: the pool.
      tokens: [B, L, D].
      mask: bool [B, L], False leaves a token out of "gap", "patches", "mean", "max", "concat", "all"; or None.
      position: int [B], index of the token that "eos" and "argmax" return.

    Returns:
      [B, D], [B, L * D] for "concat", or [B, L, D] for "all"; in the dtype of tokens. A fully masked text pools to 0.
    """
    if name not in POOLS:
        raise UserError(f"pool is `{name}`; expected one of: map, none, {', '.join(POOLS)}")
    if name in ("eos", "argmax") and position is None:
        raise UserError(f"pool `{name}` needs token ids; use it only in text towers")
    return POOLS[name](tokens, mask, position)


def _mean(tokens, mask, position):
    if mask is None:
        return jnp.mean(tokens, axis=1, dtype=jnp.promote_types(tokens.dtype, jnp.float32)).astype(tokens.dtype)
    weights = mask[..., None].astype(jnp.promote_types(tokens.dtype, jnp.float32))
    mean = jnp.sum(tokens * weights, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1.0)
    return mean.astype(tokens.dtype)


def _max(tokens, mask, position):
    if mask is None:
        return jnp.max(tokens, axis=1)
    highest = jnp.max(jnp.where(mask[..., None], tokens, -jnp.inf), axis=1)
    return jnp.where(jnp.any(mask, axis=1)[:, None], highest, 0)


def _all(tokens, mask, position):
    return tokens if mask is None else jnp.where(mask[..., None], tokens, 0)


def _concat(tokens, mask, position):
    return _all(tokens, mask, position).reshape(tokens.shape[0], -1)


def _first(tokens, mask, position):
    return tokens[:, 0]


def _second(tokens, mask, position):
    return tokens[:, 1]


def _last(tokens, mask, position):
    return tokens[:, -1]  # padding or not, as in SigLIP and LiT


def _at(tokens, mask, position):
    return jnp.take_along_axis(tokens, position[:, None, None], axis=1)[:, 0]


POOLS: dict[str, Callable] = {
    "gap": _mean,
    "patches": _mean,
    "mean": _mean,
    "max": _max,
    "concat": _concat,
    "all": _all,
    "tok": _first,
    "first": _first,
    "second": _second,
    "last": _last,
    "eos": _at,
    "argmax": _at,
}


class MapPool(Fields, kw_only=True):
    """Multi-head attention pooling: y + mlp(norm(y)) with y = attn(probe, tokens).

    Zhai et al. 2021, "Scaling Vision Transformers", section 3.2. Attributes: see `Fields`; the MLP is always `Mlp`, and
    norms of queries, keys and branches are left out.
    """

    @nn.compact
    def __call__(self, tokens, mask=None):
        """[B, L, D], mask bool [B, L] or None -> [B, D]."""
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, tokens.shape[-1]))
        probe = jnp.broadcast_to(probe.astype(self.dtype), (tokens.shape[0], 1, tokens.shape[-1]))
        mask = None if mask is None else mask[:, None, None, :]
        attn = Attention(self.heads, self.head_dim, self.attn_bias, False, self.implementation, self.dtype, name="attn")
        y, _ = attn(probe, tokens, mask)
        z = Norm(self.norm, self.norm_eps, dtype=self.dtype, name="norm")(y)
        width = self.mlp_dim or 4 * tokens.shape[-1]
        mlp = Mlp(width, self.activation, self.gated, self.mlp_bias, dtype=self.dtype, name="mlp")
        return (y + mlp(z))[:, 0]
