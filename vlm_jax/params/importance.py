"""Importance of single scalars: scores from gradients or moves, and optimizers that weigh moves by an importance."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vlm_jax.config import choose
from vlm_jax.errors import UserError
from vlm_jax.params.table import map_with_name

SCORES: dict[str, tuple[Callable, Callable]] = {  # of each tree; of the sum and the number of trees
    "gradient": (lambda g: g, lambda total, n: jnp.abs(total) / n),
    "fisher": (jnp.square, lambda total, n: total / n),
    "sensitivity": (jnp.square, lambda total, n: total),
    "movement": (lambda move: move, lambda total, n: jnp.abs(total)),
}


def scores(kind: str, trees: Iterable[Any]) -> Any:
    """Returns the importance of each scalar, a tree like each of the n `trees`, which are read once.

        gradient     |mean_i g_i|
        fisher       mean_i g_i^2, the diagonal of the empirical Fisher information
        sensitivity  sum_i g_i^2, what one step of descent on the scalar alone gains, over the rate (SPT,
                     arXiv:2303.08566, in the authors' code)
        movement     |sum_i d_i|, how far parameters moved

    Args:
      kind: as above.
      trees: gradients g_i of batches; of "movement" changes d_i of the parameters, or one tree: tuned - base.

    Raises:
      UserError: no such kind, or no trees.
    """
    each, end = choose(SCORES, kind, "the importance")
    total, n = None, 0
    for tree in trees:
        part = jax.tree.map(each, tree)
        total, n = part if total is None else jax.tree.map(jnp.add, total, part), n + 1
    if not n:
        raise UserError(f"the importance `{kind}` has nothing to read; give one batch or more")
    return jax.tree.map(lambda leaf: end(leaf, n), total)


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
