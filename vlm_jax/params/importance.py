"""Optimizers that weigh each scalar's distance from where it began by an importance."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vlm_jax.params.table import map_with_name


class Weighed(NamedTuple):
    """The state of `weighed`: of the inner optimizer, the parameters at the beginning, the sum of all gradients."""

    inner: Any
    begun: Any
    gradients: Any


def weighed(inner: optax.GradientTransformation, importance: Callable) -> optax.GradientTransformation:
    """Returns p <- (1 - m) p_0 + m (p + u), with inner's update u and m = importance(name, p_0, sum of gradients).

    p_0 are the parameters at the beginning. m = 1 everywhere is the inner optimizer, but for rounding.
    """

    def init(params):
        return Weighed(inner.init(params), params, jax.tree.map(jnp.zeros_like, params))

    def update(gradients, state, params):
        updates, after = inner.update(gradients, state.inner, params)
        total = optax.tree.add(state.gradients, gradients)
        mask = map_with_name(importance, state.begun, total)
        moved = jax.tree.map(lambda m, p0, p, u: m * (p + u - p0) + (p0 - p), mask, state.begun, params, updates)
        return moved, Weighed(after, state.begun, total)

    return optax.GradientTransformation(init, update)


def spider_importance(name: str, begun: jax.Array, gradients: jax.Array) -> jax.Array:
    """Returns SPIDER's weights of a parameter, in [0, 1]; of a stack of blocks each layer alone.

        s(x) = sigmoid((|x| - mean |x|) / std |x|),   a = s(p_0),   b = s(sum of gradients)
        m = min(1, r / mean of r's entries above 0),   r = b / (a + b) where b > a, else 0

    In the authors' code (arXiv:2411.10928). Gradients of zeros have s = 0; a single scalar stays as it began.
    """
    axes = tuple(range(1 if "blocks" in name.split("/") else 0, begun.ndim))
    count = max(begun.size // (begun.shape[0] if 0 not in axes and begun.ndim else 1), 1)
    over = dict(axis=axes, keepdims=True)

    def score(x):
        size = jnp.abs(x)
        apart = size - jnp.mean(size, **over)
        std = jnp.sqrt(jnp.sum(apart**2, **over) / max(count - 1, 1))
        return jnp.where(jnp.any(x != 0, **over), jax.nn.sigmoid(apart / jnp.where(std == 0, 1, std)), 0)

    a, b = score(begun), score(gradients)
    if count == 1:
        return jnp.zeros_like(begun)
    r = jnp.where(b > a, b / jnp.where(a + b == 0, 1, a + b), 0)
    mean = jnp.sum(r, **over) / jnp.maximum(jnp.sum(r > 0, **over), 1)
    return jnp.minimum(1, r / jnp.where(mean == 0, 1, mean)).astype(begun.dtype)
