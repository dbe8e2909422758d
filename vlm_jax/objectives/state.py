"""What an objective adds to a run: parameters of its terms, memories, teachers; and which parameters it moves."""

import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.interpreters import partial_eval

from vlm_jax.errors import UserError
from vlm_jax.objectives.outputs import OWN, fold
from vlm_jax.objectives.sum import Sum
from vlm_jax.objectives.term import WHERE, Context, Objective
from vlm_jax.params.table import named_leaves


def make(
    objective: Objective, model: Any, params: Any, batch: Mapping[str, Any], rng: jax.Array, frozen: Any = None
) -> tuple[Any, Any]:
    """Returns (parameters with the terms' own, memory or None). Of the batch, only shapes and dtypes count."""
    made: dict[str, Any] = {}
    parts = Sum(objective, model, batch, rng, frozen=frozen, made=made)
    features, rows = parts.encode_all(params)
    given = lambda term: term.seen({name: features[name][term.name] for name in term.sets})
    terms = {term.name: term.init(given(term)) for term in objective.terms if term.init}
    parts.state = {"terms": terms}
    parts.losses(params, features, rows)  # makes the parts that only losses call
    if made:
        params = {**params, OWN: made}
    averaged = {name: teacher.of for name, teacher in objective.teachers.items() if teacher.spec is None}
    teachers = {name: _chosen(params, of, name) for name, of in averaged.items()}
    return params, {"terms": terms, "teachers": teachers} if terms or teachers else None


def update(objective: Objective, state: Any, params: Any, features: Any, rng: jax.Array | None, step: Any) -> Any:
    """Returns the memory after a step.

    Args:
      objective: the objective.
      state: the memory before, or None.
      params: parameters after the optimizer.
      features: of the step, the last result of `value_and_grad`.
      rng: key of the step.
      step: number of steps before this one.
    """
    if state is None:
        return None
    terms = dict(state["terms"])
    for term in objective.terms:
        if term.update:
            given = jax.lax.stop_gradient(term.seen({name: features[name][term.name] for name in term.sets}))
            context = Context(step, True, fold(rng, f"{term.name} update"), terms[term.name], objective.tokenizer)
            new = lambda term=term, given=given, context=context: term.update(context.state, given, context)
            old = lambda context=context: context.state
            terms[term.name] = jax.lax.cond(term.weight(step) != 0, new, old) if callable(term.weight) else new()
    follow = lambda name, old: _follow(objective.teachers[name], name, old, params, state["teachers"], step)
    return {"terms": terms, "teachers": {name: follow(name, old) for name, old in state["teachers"].items()}}


def _follow(teacher, name, average, params, teachers, step):
    """Returns d * average + (1 - d) * target; equal parameters stay equal bit for bit."""
    decay = teacher.decay
    if decay == 1.0:
        return average
    params = _chosen(params, teacher.of, name)
    if teacher.anchor:
        params = jax.tree.map(lambda p, a: ((p + a) / 2).astype(p.dtype), params, teachers[teacher.anchor])
    share = 1 - (decay(step) if callable(decay) else decay)
    return jax.tree.map(lambda a, p: (a + share * (p - a)).astype(a.dtype), average, params)


def _chosen(params: Any, of: str, teacher: str) -> Any:
    """Returns the parameters whose names a regex matches."""
    if of == ".*":
        return params
    leaves = traverse_util.flatten_dict(params, sep="/")
    chosen = {name: leaf for name, leaf in leaves.items() if re.fullmatch(of, name)}
    if not chosen:
        raise UserError(f"{WHERE}.teachers.{teacher}.of, `{of}`, matches no parameter, such as {next(iter(leaves))}")
    return traverse_util.unflatten_dict(chosen, sep="/")


def reached(
    objective: Objective, model: Any, params: Any, batch: Mapping[str, Any], state: Any, frozen: Any = None
) -> dict[str, tuple[Callable, ...] | None]:
    """Returns, for each parameter that a term's gradient reaches, the weights that switch these terms on; None: always.

    Args:
      objective, model: as for `value_and_grad`.
      params, batch, state, frozen: arrays or shapes.

    Raises:
      UserError: a term reaches no parameter.
    """

    def losses(params, batch, state, frozen, rng):
        parts = Sum(objective, model, batch, rng, state=state, frozen=frozen, made={})  # made: all terms are on
        return list(parts.losses(params, *parts.encode_all(params))[0].values())

    def tangents(params, moves, *others):
        return jax.jvp(lambda params: losses(params, *others), (params,), (moves,))[1]

    rng = jax.eval_shape(lambda: jax.random.key(0))
    jaxpr = jax.make_jaxpr(tangents)(params, params, batch, state, frozen or {}, rng).jaxpr
    leaves = named_leaves(params)
    found: dict[str, list] = {}
    for i, term in enumerate(objective.terms):
        _, needed = partial_eval.dce_jaxpr(jaxpr, [j == i for j in range(len(objective.terms))])
        moved = [name for name, used in zip(leaves, needed[len(leaves) :], strict=False) if used]
        names = [name for name in moved if re.fullmatch(term.reaches, name)]
        if not names:
            raise UserError(
                f"{WHERE}: the term `{term.name}` reaches no parameter: its loss depends on {len(moved)} parameters, "
                f"of which `reaches`, `{term.reaches}`, matches none"
            )
        for name in names:
            found.setdefault(name, []).append(objective.schedules_of(term))
    join = lambda weights: None if None in weights else tuple(dict.fromkeys(itertools.chain(*weights)))
    return {name: join(weights) for name, weights in found.items()}


def refreshed(objective: Objective) -> set[str]:
    """Returns the names of the teachers that begin each stage as the model is then."""
    return {name for name, teacher in objective.teachers.items() if teacher.refresh}


def active(reach: Mapping[str, tuple[Callable, ...] | None], step: Any) -> dict[tuple, jax.Array]:
    """Returns, for each value of `reached` but None, whether one of the weights differs from 0 at a step."""
    switches = [weights for weights in dict.fromkeys(reach.values()) if weights]
    return {weights: jnp.stack([weight(step) != 0 for weight in weights]).any() for weights in switches}


def frozen(objective: Objective) -> dict[str, Any]:
    """Returns the parameters of the teachers with a `spec` that are not stored."""
    return {name: teacher.params for name, teacher in objective.teachers.items() if teacher.model is not None}


def check_stored(objective: Objective, stored: Mapping[str, str]) -> None:
    """Raises a UserError if a stored teacher has another checkpoint than what was stored, {name: spec}."""
    for name, teacher in objective.teachers.items():
        if teacher.stored and stored.get(name, teacher.spec) != teacher.spec:
            raise UserError(
                f"{WHERE}.teachers.{name} is `{teacher.spec}`, what config.data.reinforced holds is of "
                f"`{stored[name]}`; precompute it anew"
            )
