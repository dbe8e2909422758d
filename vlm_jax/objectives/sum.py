"""The value of an objective: all row sets in order, then the weighted sum of the terms' losses."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from vlm_jax.errors import UserError
from vlm_jax.objectives.outputs import Outputs, Taught, fold
from vlm_jax.objectives.term import WHERE, Context, Feature, Objective, Row, Selection, Term, row_sets


def value(
    objective: Objective,
    model: Any,
    params: Any,
    batch: Mapping[str, Any],
    rng: jax.Array | None,
    *,
    step: Any = 0,
    state: Any = None,
    frozen: Mapping[str, Any] | None = None,
    train: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns (loss, metrics) of a batch; arguments as for `value_and_grad`.

    The metrics are "loss", and of each term "<term>/loss" and "<term>/<name>"; NaN while the term's weight is 0.
    """
    parts = Sum(objective, model, batch, rng, step=step, state=state, frozen=frozen, train=train)
    features, rows = parts.encode_all(params)
    values, metrics = parts.losses(params, features, rows)
    return parts.total(values), metrics | {"loss": parts.total(values)}


def size(rows: Mapping[str, Any]) -> int:
    """Returns the number of rows."""
    return len(next(iter(jax.tree.leaves(dict(rows)))))


class Sum:
    """An objective on one batch at one step. Arguments as for `value_and_grad`; `made` as for `Outputs`."""

    def __init__(self, objective, model, batch, rng, *, step=0, state=None, frozen=None, train=True, made=None):
        self.objective, self.model, self.rng, self.step, self.train = objective, model, rng, step, train
        self.state, self.frozen, self.made = state or {}, frozen or {}, made
        self.sources = row_sets(batch)
        _check_sets(objective, self.sources)
        self.weights = {t.name: t.weight(step) if callable(t.weight) else t.weight for t in objective.terms}

    def total(self, values: Mapping[str, jax.Array]) -> jax.Array:
        """Returns the weighted sum of some terms' losses."""
        return sum(self.weights[name] * one for name, one in values.items())

    def encode_all(self, params, encode: Callable | None = None) -> tuple[dict, dict]:
        """Returns ({row set: {user: features}}, {row set: rows}).

        `encode(name, features, rows)` encodes one set, given the features and rows of the sets before; by default in
        one piece.
        """
        encode = encode or (lambda *args: self.encode_whole(params, *args))
        features, rows = {}, dict(self.sources)
        for name in self.objective.sets:
            features[name] = encode(name, features, rows)
            for selection in self.objective.selections:
                if selection.on == name:
                    rows[selection.name] = self._select(selection, features[name][selection.name], rows)
        return features, rows

    def encode_whole(self, params, name, features, rows) -> dict:
        """Encodes a row set in one piece."""
        index = jnp.arange(size(rows[name]))
        return self.encode(params, name, rows[name], self.before(name, features), rows, index, 0)

    def before(self, name: str, features: Mapping) -> Any:
        """Returns the features that a made row set may look up."""
        selection = self.objective.made.get(name)
        return features[selection.on][name] if selection else {}

    def encode(self, params, name, part, before, rows, index, piece, users: Iterable | None = None) -> dict:
        """Returns {user: features} of some rows of a set.

        Args:
          params: parameters.
          name: of the set.
          part: the rows, with look-ups.
          before: features that look-ups may name.
          rows: of all sets so far, whole.
          index: of these rows in the set, [b].
          piece: number of the micro-batch.
          users: terms and selections; defaults to all that use the set.
        """
        users = self.objective.users_of(name) if users is None else users
        keys = dropout = None
        if self.rng is not None:
            keys = jax.vmap(lambda i: jax.random.fold_in(fold(self.rng, f"rows {name}"), i))(index)
            dropout = jax.random.fold_in(fold(self.rng, f"dropout {name}"), piece)
        outputs = self._outputs(params, self._resolved(name, part, before, rows), dropout, keys)
        found = {}
        for schedules in dict.fromkeys([None, *map(self.objective.schedules_of, users)]):  # what is always on: first
            some = [user for user in users if self.objective.schedules_of(user) == schedules]
            if some:
                run = partial(self._features, name, some, outputs, schedules)
                found |= self._when(schedules, run, 0)
        return found

    def _features(self, name, users, outputs, schedules):
        outputs = outputs if self._always(schedules) else outputs.fork()
        return {user.name: user.features_of(name)(outputs.of(user.name), self._context()) for user in users}

    def losses(self, params, features, rows) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Returns ({term: loss}, metrics)."""
        outputs, values, metrics = self._outputs(params, {}, self.rng, None), {}, {}
        for term in self.objective.terms:
            loss = partial(self._loss, term, outputs, features, rows)
            on = self.objective.schedules_of(term)
            values[term.name], more = self._when(on, loss, (0, jnp.nan))
            shown = values[term.name] if on is None else jnp.where(self._on(on), values[term.name], jnp.nan)
            metrics |= {f"{term.name}/{key}": one for key, one in more.items()} | {f"{term.name}/loss": shown}
        return values, metrics

    def _loss(self, term, outputs, features, rows):
        outputs = outputs if self._always(self.objective.schedules_of(term)) else outputs.fork()
        given = {name: features[name][term.name] for name in term.sets}
        rows = {name: self._arrays(name, rows) for name in term.sets}
        return term.loss(outputs.of(term.name), term.seen(given), term.seen(rows), self._context(term))

    def _select(self, selection: Selection, features, rows) -> dict:
        """Returns the rows that a selection makes; no gradient flows to them but through `Feature`."""
        groups, context = selection.groups, self._context(selection)
        features, rows = jax.lax.stop_gradient((features, self._arrays(selection.on, rows)))
        if size(rows) % groups:
            raise UserError(
                f"{WHERE}: the selection `{selection.name}` has {groups} groups, which do not divide {size(rows)} rows"
            )

        def run():
            if groups == 1:
                return selection.select(features, rows, context)
            cut = lambda tree: jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), tree)
            one = lambda features, rows, rng: selection.select(features, rows, context._replace(rng=rng))
            rngs = None if context.rng is None else jax.random.split(context.rng, groups)
            made = jax.vmap(one)(cut(features), cut(rows), rngs)
            return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), made)

        return jax.lax.stop_gradient(self._when(self.objective.schedules_of(selection), run, 0))

    def _arrays(self, name, rows):
        """Returns the rows of a set without look-ups: those of rows are resolved, those of features left out."""
        part = {key: entry for key, entry in rows[name].items() if not isinstance(entry, Feature)}
        return self._resolved(name, part, {}, rows)

    def _resolved(self, name, part, before, rows):
        """Returns rows whose look-ups are replaced by what they name."""
        selection = self.objective.made.get(name)
        if selection is None:
            return part

        def one(entry):
            if not isinstance(entry, Row | Feature):
                return entry
            source = before if isinstance(entry, Feature) else self._arrays(selection.on, rows)
            if entry.key not in source:
                kind = "features" if isinstance(entry, Feature) else f"rows of `{selection.on}`"
                raise UserError(
                    f"{WHERE}: the selection `{name}` looks up `{entry.key}`, which its {kind} lack; they have: "
                    f"{', '.join(source) or 'nothing'}"
                )
            return jax.tree.map(lambda x: _grouped(x, entry.index, selection.groups), source[entry.key])

        return {key: one(entry) for key, entry in part.items()}

    def _outputs(self, params, rows, rng, keys):
        averages = self.state.get("teachers", {})
        teachers = {}
        for name, teacher in self.objective.teachers.items():
            if teacher.stored:
                teachers[name] = None
                continue
            own = self.frozen.get(name) if teacher.model is not None else averages.get(name)
            own = params if own is None else own if teacher.of == ".*" else _over(params, own)
            teachers[name] = Taught(teacher.model or self.model, own, teacher.inputs)
        options = dict(keys=keys, teachers=teachers, made=self.made)
        return Outputs(self.model, params, rows, train=self.train, rng=rng, **options)

    def _context(self, user: Term | Selection | None = None) -> Context:
        """Returns the context of a user; without a user, that of features."""
        context = Context(self.step, self.train, tokenizer=self.objective.tokenizer)
        if user is None:
            return context
        return context._replace(rng=fold(self.rng, user.name), state=self.state.get("terms", {}).get(user.name))

    def _always(self, schedules: tuple | None) -> bool:
        return schedules is None or self.made is not None

    def _on(self, schedules: tuple) -> jax.Array:
        """Returns whether one of the weights differs from 0 at this step."""
        return jnp.stack([jnp.asarray(schedule(self.step)) != 0 for schedule in schedules]).any()

    def _when(self, schedules: tuple | None, run: Callable, otherwise: Any) -> Any:
        """Returns `run()` if one of the weights differs from 0; else arrays of `otherwise`, a prefix of the tree."""
        if self._always(schedules):
            return run()
        shapes = jax.eval_shape(run)
        fill = lambda value, tree: jax.tree.map(lambda x: jnp.full(x.shape, value, x.dtype), tree)
        return jax.lax.cond(self._on(schedules), run, lambda: jax.tree.map(fill, otherwise, shapes))


def _over(params: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Returns parameters, some of them replaced by a teacher's own."""
    leaves = [traverse_util.flatten_dict(tree, sep="/") for tree in (params, own)]
    return traverse_util.unflatten_dict(leaves[0] | leaves[1], sep="/")


def _check_sets(objective: Objective, sources: Mapping[str, Any]) -> None:
    known = [*sources, *objective.made]
    for user in objective.users:
        for name in user.sets:
            if name not in known:
                raise UserError(
                    f"{WHERE}: `{user.name}` reads the row set `{name}`, which neither the batch has nor a selection "
                    f"makes; there are: {', '.join(known)}"
                )


def _grouped(x: jax.Array, index: jax.Array, groups: int) -> jax.Array:
    """Returns x[index], where each part of the index is of rows of its own group."""
    if groups == 1:
        return jnp.asarray(x)[index]
    parts = jax.vmap(lambda x, i: x[i])(jnp.asarray(x).reshape(groups, -1, *x.shape[1:]), index.reshape(groups, -1))
    return parts.reshape(-1, *x.shape[1:])
