"""Training of heads on cached features: one jitted scan over steps, in float32; the last step's weights are kept."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vlm_jax.errors import DivergedError, UserError

EPS = 1e-4  # Adam's, in the code of Tip-Adapter and of ProLIP
matmul = functools.partial(jnp.matmul, precision="highest")


def cross_entropy(logits: jax.Array, labels: jax.Array, where: jax.Array | None = None) -> jax.Array:
    """The mean cross-entropy of logits [N, C] and labels int [N]."""
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels), where=where)


def descend(loss: Callable, params: Any, optimizer: optax.GradientTransformation, batches: jax.Array) -> tuple:
    """Takes an optimizer step on `loss(params, batch)` for each batch; returns the parameters and the losses."""

    def step(carry, batch):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), batches)
    return params, losses


def shuffled(rows: int, size: int, epochs: int, seed: int | tuple[int, int]) -> np.ndarray:
    """Rows of the batches of some epochs, int [steps, size]; -1 fills up the last batch of an epoch."""
    if size < 1:
        raise UserError(f"batch_size is {size}; expected a number above 0")
    size = min(size, rows)
    rng, short = np.random.default_rng(seed), -rows % size
    order = [np.pad(rng.permutation(rows), (0, short), constant_values=-1) for _ in range(epochs)]
    return np.concatenate([np.empty(0, np.int64), *order]).reshape(-1, size)


def finite(trained: jax.Array, losses: jax.Array) -> np.ndarray:
    """Returns `trained` on the host; raises a DivergedError if `trained` or a loss is not finite."""
    if not (jnp.isfinite(losses).all() and jnp.isfinite(trained).all()):
        raise DivergedError("the head's training has diverged (its loss is not finite); a smaller learning_rate?")
    return np.asarray(trained)
