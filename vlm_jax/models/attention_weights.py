"""The softmax of attention, which kernels do not return: computed again from queries and keys, of watched modules."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.errors import UserError
from vlm_jax.models.block import Block
from vlm_jax.models.layers import Attention


def softmax_of(module: Attention, projected: Mapping, x, kv=None, mask=None, *, logits_bias=None, **_) -> jax.Array:
    """Computes the softmax of `Attention` again, at least fp32 [B, heads, Lq, Lk].

    Args:
      module: the module.
      projected: its "query" and "key" after `turned`, [B, L, heads, head_dim].
      Others: those of the module's call.
    """
    del x, kv
    query, key = projected["query"], projected["key"]
    scale = query.shape[-1] ** -0.5 if module.scale is None else module.scale
    exact = jnp.promote_types(query.dtype, jnp.float32)
    logits = scale * jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=exact)
    logits = logits if logits_bias is None else logits + logits_bias
    logits = logits if mask is None else jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    if module.causal:
        logits = jnp.where(jnp.tri(*logits.shape[-2:], dtype=bool), logits, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(logits, axis=-1)


def of_blocks(run: Callable[[], Any], side: str) -> jax.Array:
    """Returns the self-attention of all blocks of a tower while `run` applies the model, [B, depth, heads, L, L].

    Args:
      run: applies the model to inputs of one tower alone.
      side: the attribute of the tower, such as "image"; towers may share their blocks.

    Raises:
      UserError: the tower has no blocks of a transformer.
    """
    projected, found = {}, []

    def watch(call, args, kwargs, context):
        module, method, path = context.module, context.method_name, context.module.path
        result = call(*args, **kwargs)
        own = path[:1] in ((side,), ("trunk",))
        if own and isinstance(module, Attention) and path[-1] == "attn":
            if method == "turned":
                projected[args[0]] = result
            elif method == "__call__":
                projected["weights"] = softmax_of(module, projected, *args, **kwargs)
        elif own and isinstance(module, Block) and method == "__call__":
            tokens, other = result
            return tokens, other._replace(statistics={**other.statistics, "attention": projected["weights"]})
        elif own and method == "stack" and "attention" in result.aux:
            found[:] = [result.aux["attention"]]
        return result

    with nn.intercept_methods(watch):
        run()
    if not found:
        raise UserError(f"the {side} tower has no blocks of a transformer, and no attention of its tokens")
    return found[0]
