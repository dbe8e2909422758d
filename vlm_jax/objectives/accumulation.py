"""Loss and gradients of an objective, in one piece or exactly accumulated over micro-batches."""

from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.errors import UserError
from vlm_jax.objectives.objective import Objective


def value_and_grad(
    objective: Objective,
    params: Any,
    batch: Any,
    rng: Any,
    *,
    state: Any = None,
    accumulate: int = 1,
    trainable: Any = None,
) -> tuple[jax.Array, dict[str, jax.Array], Any, Any]:
    """Returns (loss, metrics, grads, state) of `loss(params, encode(params, batch, rng), batch)`.

    `accumulate=k` (GradCache, Gao et al. 2021, arXiv:2101.06983) encodes the batch in k micro-batches without keeping
    activations, differentiates `loss` once with respect to the parameters and the features of the whole batch, and
    encodes each micro-batch again, with the same rng, to pull back the cotangents of the features. The gradients equal
    the full batch's for every parameter, also for those that only `loss` reads. Memory holds the activations of one
    micro-batch; the cost is one more forward pass. Only the random numbers differ from k = 1: micro-batch i draws from
    `fold_in(rng, i)`.

    Row r goes to micro-batch r % k, so that slicing a batch sharded on its leading axis moves no data.

    Args:
      objective: the objective to differentiate.
      params: parameter tree.
      batch: pytree; all leaves have the same leading axis B.
      rng: a `jax.random.key`, or None for no randomness.
      state: the objective's state, for objectives that have `init`.
      accumulate: number of micro-batches; must divide B.
      trainable: tree like `params` of bools. Where False, gradients are zeros and cost no computation.

    Raises:
      UserError: B is not divisible by `accumulate`.
    """
    if trainable is not None:
        trained_only = lambda params: jax.tree.map(
            lambda p, train: p if train else jax.lax.stop_gradient(p), params, trainable
        )
    else:
        trained_only = lambda params: params

    def encode(params, batch, rng):
        extra = () if objective.init is None else (state,)
        return objective.encode(trained_only(params), batch, rng, *extra)

    def loss(params, features):
        extra = () if objective.init is None else (state,)
        value, metrics, *new_state = objective.loss(trained_only(params), features, batch, *extra)
        return value, (metrics, new_state[0] if new_state else state)

    if accumulate == 1:
        full = lambda params: loss(params, encode(params, batch, rng))
        (value, (metrics, state)), grads = jax.value_and_grad(full, has_aux=True)(params)
        return value, metrics, grads, state

    _check_divisible(batch, accumulate)
    micro_batch = lambda i: jax.tree.map(lambda x: _take(x, i, accumulate), batch)
    micro_rng = lambda i: None if rng is None else jax.random.fold_in(rng, i)
    indices = jnp.arange(accumulate)

    _, features = jax.lax.scan(lambda _, i: (None, encode(params, micro_batch(i), micro_rng(i))), None, indices)
    features = jax.tree.map(_in_batch_order, features)
    floating, merge = _split_floating(features)

    full = lambda params, floating: loss(params, merge(floating))
    (value, (metrics, state_after)), (grads, cotangents) = jax.value_and_grad(full, argnums=(0, 1), has_aux=True)(
        params, floating
    )

    def pull_back(grads, i):
        encode_micro = lambda params: _split_floating(encode(params, micro_batch(i), micro_rng(i)))[0]
        _, pull = jax.vjp(encode_micro, params)
        (micro_grads,) = pull([_take(cotangent, i, accumulate) for cotangent in cotangents])
        return jax.tree.map(jnp.add, grads, micro_grads), None

    grads, _ = jax.lax.scan(pull_back, grads, indices)
    return value, metrics, grads, state_after


def _check_divisible(batch, accumulate):
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1 or () in sizes:
        shapes = jax.tree.map(jnp.shape, batch)
        raise UserError(f"accumulation needs batch entries with one leading axis; got the shapes {shapes}")
    (size,) = next(iter(sizes))
    if accumulate < 1 or size % accumulate:
        raise UserError(
            f"a batch of {size} cannot be cut into {accumulate} equal micro-batches; change config.accumulate"
        )


def _take(x, i, k):
    """Returns micro-batch i of k: rows i, i + k, i + 2k, ... of x [B, ...] -> [B/k, ...]."""
    return jax.lax.dynamic_index_in_dim(x.reshape(x.shape[0] // k, k, *x.shape[1:]), i, axis=1, keepdims=False)


def _in_batch_order(x):
    """Inverts `_take` for all micro-batches: [k, B/k, ...] -> [B, ...]."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _split_floating(features):
    """Returns the floating-point leaves, and a function that puts new values for these leaves into the tree."""
    leaves, structure = jax.tree.flatten(features)
    where = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

    def merge(floating):
        merged = list(leaves)
        for i, leaf in zip(where, floating, strict=True):
            merged[i] = leaf
        return jax.tree.unflatten(structure, merged)

    return [leaves[i] for i in where], merge
