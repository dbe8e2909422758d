"""Loss and gradients of an objective, in one piece or exactly accumulated over micro-batches."""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.errors import UserError
from vlm_jax.objectives.sum import Sum, size
from vlm_jax.objectives.term import Feature, Objective, Selection, row_sets
from vlm_jax.params.table import map_with_name


def value_and_grad(
    objective: Objective,
    model: Any,
    params: Any,
    batch: Mapping[str, Any],
    rng: jax.Array | None,
    *,
    step: Any = 0,
    state: Any = None,
    frozen: Mapping[str, Any] | None = None,
    train: bool = True,
    accumulate: int = 1,
    trainable: Any = None,
) -> tuple[jax.Array, dict[str, jax.Array], Any, dict]:
    """Returns (loss, metrics, grads, features) of the weighted sum of an objective's terms.

    `accumulate=k` (GradCache, Gao et al. 2021, arXiv:2101.06983) encodes all row sets in order, in micro-batches,
    without keeping activations; differentiates the losses once with respect to the parameters and the features of all
    rows; then goes through the sets in reverse, encodes each micro-batch again and pulls back the cotangents of its
    features. The gradients equal the full batch's for every parameter. Memory holds the activations of one micro-batch.
    The cost is one more forward pass of what needs a gradient. Only dropout differs from k = 1: `outputs.keys` do not.

    A set of n rows is cut into gcd(n / groups of its selection, k) micro-batches. Row r goes to micro-batch r % k, so
    that slicing a batch sharded on its leading axis moves no data.

    Args:
      objective: the objective to differentiate.
      model: linen module.
      params: parameter tree; the terms' own parameters under "objective".
      batch: rows, a dict of arrays with one leading axis; or {source: rows}.
      rng: a `jax.random.key`, or None if nothing draws.
      step: number of steps before this one.
      state: memory, the result of `make` or `update`.
      frozen: parameters of the teachers with a `spec`, by name.
      train: whether dropout is active.
      accumulate: number of micro-batches; must divide the rows of the largest source.
      trainable: tree like `params` of bools. Where False, gradients are zeros and cost no computation.

    Raises:
      UserError: the rows cannot be cut, or a term needs what neither rows nor model have.
    """
    _check_sizes(row_sets(batch), accumulate)
    parts = Sum(objective, model, batch, rng, step=step, state=state, frozen=frozen, train=train)
    held = lambda params: params
    if trainable is not None:
        held = lambda params: jax.tree.map(lambda p, t: p if t else jax.lax.stop_gradient(p), params, trainable)
    # one backward pass for each set of parameters that terms reach, or for each term whose gradients are combined
    group_of = {term.name: term.name if objective.combine else term.reaches for term in objective.terms}
    groups = list(dict.fromkeys(group_of.values()))
    split = lambda values: [
        parts.total({name: one for name, one in values.items() if group_of[name] == group}) for group in groups
    ]

    def one_piece(params):
        features, rows = parts.encode_all(held(params))
        values, metrics = parts.losses(held(params), features, rows)
        return split(values), (metrics, features)

    if accumulate == 1:
        values, pull, (metrics, features) = jax.vjp(one_piece, params, has_aux=True)
        grads = [pull(one_hot)[0] for one_hot in _one_hots(values)]
    else:
        cut = _Cut(parts, held, params, accumulate)
        features, rows = parts.encode_all(params, cut.encode_set)
        used = {name: {t.name: features[name][t.name] for t in objective.terms if name in t.sets} for name in features}
        floating, merge = _split_floating(used)

        def losses(params, floating):
            values, metrics = parts.losses(held(params), merge(floating), rows)
            return split(values), metrics

        values, pull, metrics = jax.vjp(losses, params, floating, has_aux=True)
        pulled = [pull(one_hot) for one_hot in _one_hots(values)]
        grads = cut.pull_back([g for g, _ in pulled], [merge(c, empty=True) for _, c in pulled], features, rows)
    reach = {term.name: term.reaches for term in objective.terms} if objective.combine else {g: g for g in groups}
    grads = {group: _only(reach[group], one) for group, one in zip(groups, grads, strict=True)}
    total = objective.combine(grads, params) if objective.combine else jax.tree.map(lambda *x: sum(x), *grads.values())
    value = sum(values)
    return value, metrics | {"loss": value}, total, features


class _Cut:
    """Row sets encoded in micro-batches, forward and backward."""

    def __init__(self, parts: Sum, held: Callable, params: Any, accumulate: int):
        self.parts, self.held, self.params, self.accumulate = parts, held, params, accumulate
        self.objective = parts.objective

    def encode_set(self, name, features, rows):
        """Encodes a set without keeping activations."""
        before, k = self.parts.before(name, features), self._pieces(name, rows)
        one = lambda _, i: (None, self._micro(self.params, name, before, rows, i, k))
        return jax.tree.map(_in_order, jax.lax.scan(one, None, jnp.arange(k))[1])

    def pull_back(self, grads, cotangents, features, rows):
        """Returns the gradients of each group plus those that reach the parameters through features.

        Args:
          grads: of each group, parameter trees.
          cotangents: of each group, {row set: {user: tree like the features, None where they are no floats}}.
          features: {row set: {user: features}}.
          rows: {row set: rows}.
        """
        for name in reversed(self.objective.sets):
            given_to = cotangents[0][name]
            users = [user for user in self.objective.users_of(name) if jax.tree.leaves(given_to.get(user.name))]
            if not users:
                continue
            before, k = self.parts.before(name, features), self._pieces(name, rows)
            entries = [entry for entry in rows[name].values() if isinstance(entry, Feature)]
            looked_up, merge = _split_floating({entry.key: before[entry.key] for entry in entries})
            given = [[jax.tree.leaves(c[name][user.name]) for user in users] for c in cotangents]

            def micro(params, looked_up, i, name=name, before=before, merge=merge, k=k, users=users):
                found = self._micro(params, name, {**before, **merge(looked_up)}, rows, i, k, users)
                return [_split_floating(found[user.name])[0] for user in users]

            def pull_back(carry, i, micro=micro, looked_up=looked_up, given=given, k=k):
                _, pull = jax.vjp(lambda *args: micro(*args, i), self.params, looked_up)
                pulled = [pull(jax.tree.map(partial(_take, i=i, k=k), one)) for one in given]
                return jax.tree.map(jnp.add, carry, pulled), None

            start = [(one, jax.tree.map(jnp.zeros_like, looked_up)) for one in grads]
            carry, _ = jax.lax.scan(pull_back, start, jnp.arange(k))
            grads = [one for one, _ in carry]
            if looked_up:
                parent = self.objective.made[name].on
                for cotangent, (_, one) in zip(cotangents, carry, strict=True):
                    cotangent[parent][name] = {**jax.tree.map(_zeros, before), **merge(one, empty=True)}
        return grads

    def _micro(self, params, name, before, rows, i, k, users=None):
        part = jax.tree.map(lambda x: _take(x, i, k), rows[name])
        index = _take(jnp.arange(size(rows[name])), i, k)
        return self.parts.encode(self.held(params), name, part, before, rows, index, i, users)

    def _pieces(self, name, rows):
        selection: Selection | None = self.objective.made.get(name)
        return math.gcd(size(rows[name]) // (selection.groups if selection else 1), self.accumulate)


def _one_hots(values):
    """Returns the cotangents that pull back one value each."""
    return [[jnp.full_like(value, i == j) for j, value in enumerate(values)] for i in range(len(values))]


def _only(regex, grads):
    if regex == ".*":
        return grads
    return map_with_name(lambda name, x: x if re.fullmatch(regex, name) else jnp.zeros_like(x), grads)


def _check_sizes(sources: Mapping[str, Mapping[str, Any]], accumulate: int) -> None:
    for name, rows in sources.items():
        if len({jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(rows)} - {()}) != 1:
            shapes = jax.tree.map(jnp.shape, rows)
            raise UserError(f"the rows of `{name}` need one leading axis in common; got the shapes {shapes}")
    rows = max(map(size, sources.values()))
    if accumulate < 1 or rows % accumulate:
        raise UserError(
            f"a batch of {rows} cannot be cut into {accumulate} equal micro-batches; change config.accumulate"
        )


def _take(x, i, k):
    """Returns micro-batch i of k: rows i, i + k, i + 2k, ... of x [B, ...] -> [B/k, ...]."""
    return jax.lax.dynamic_index_in_dim(x.reshape(x.shape[0] // k, k, *x.shape[1:]), i, axis=1, keepdims=False)


def _in_order(x):
    """Inverts `_take` for all micro-batches: [k, B/k, ...] -> [B, ...]."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _is_floating(x):
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _zeros(x):
    return jnp.zeros_like(x) if _is_floating(x) else None


def _split_floating(tree):
    """Returns the floating-point leaves, and `merge(new leaves, empty=False)`, which puts them into the tree.

    With `empty`, the other leaves become None.
    """
    leaves, structure = jax.tree.flatten(tree)
    where = [i for i, leaf in enumerate(leaves) if _is_floating(leaf)]

    def merge(floating, empty=False):
        merged = [None] * len(leaves) if empty else list(leaves)
        for i, leaf in zip(where, floating, strict=True):
            merged[i] = leaf
        return jax.tree.unflatten(structure, merged)

    return [leaves[i] for i in where], merge
