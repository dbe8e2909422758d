"""What a term sees of the model: outputs by name, each computed once, and calls of the model, of parts, of teachers."""

import collections
import copy
import inspect
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax

from vlm_jax.errors import UserError
from vlm_jax.objectives.term import WHERE

OWN = "objective"
"""The parameters of terms stand below this name; they are no part of the model, and no export has them."""


def of_model(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns parameters without the terms' own."""
    return {name: leaf for name, leaf in params.items() if name != OWN}


def fold(rng: jax.Array | None, name: str) -> jax.Array | None:
    """Returns the key of a name."""
    return None if rng is None else jax.random.fold_in(rng, zlib.crc32(name.encode()) & 0x7FFFFFFF)


class Taught(NamedTuple):
    """A teacher's model, its parameters, and the rows that it reads in the place of the model's."""

    model: nn.Module
    params: Any
    inputs: Mapping[str, str]


class Outputs:
    """A model under parameters, on rows.

        outputs["image_embedding"]        an output that the model declares, or an entry of the rows of this name
        outputs.apply("describe", x)      a call of the model's method; not shared between terms
        outputs.part("head", module, x)   a module of the term's own; its parameters are "objective/<term>/head"
        outputs.once("name", compute)     compute(outputs), shared between terms by its name
        outputs.on(token_ids=ids)         a view on other rows
        outputs.teacher("momentum")       the same rows under a teacher
        outputs.rows, outputs.params, outputs.train
        outputs.keys                      a `jax.random.key` for each row, [B]; the same for any accumulation

    Models declare outputs in the class attribute `outputs`, {name: function of Outputs}.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Mapping[str, Any],
        rows: Mapping[str, Any],
        *,
        train: bool = False,
        rng: jax.Array | None = None,
        keys: jax.Array | None = None,
        teachers: Mapping[str, Taught | None] | None = None,
        made: dict | None = None,
    ):
        """`made` is filled with the parameters of parts that `params` lack, while a run's parameters are made.

        A teacher is None if what it says is stored in the rows, as "<teacher>/<output>".
        """
        self.model, self.params, self.rows, self.train, self.keys = model, params, rows, train, keys
        self._rng, self._teachers, self._made = rng, teachers or {}, made
        self._memo, self._taught = {}, {}
        self._user, self._scope, self._calls = "", "", collections.Counter()
        self._owner = "the model"

    def __getitem__(self, name: str) -> Any:
        if name in self.rows:
            return self.rows[name]
        declared = getattr(self.model, "outputs", {})
        if name not in self._memo and name not in declared:
            raise UserError(
                f"{WHERE}: `{self._user}` needs `{name}`, which neither the batch nor {self._owner} has; the batch "
                f"has: {', '.join(self.rows) or 'nothing here'}; {self._owner}: {', '.join(declared) or 'nothing'}"
            )
        return self.once(name, declared.get(name))

    def once(self, name: str, compute: Callable[["Outputs"], Any]) -> Any:
        """Returns `compute(outputs)`, computed once for all terms that ask for the name."""
        if name not in self._memo:
            self._memo[name] = compute(self.of(name))
        return self._memo[name]

    def apply(self, method: str, *args: Any, **options: Any) -> Any:
        """Calls a method of the model."""
        if "train" in inspect.signature(getattr(self.model, method)).parameters:
            options["train"] = self.train
        rngs = None
        if self.train and self._rng is not None:
            self._calls[method] += 1
            rngs = {"dropout": fold(self._rng, f"{self._scope} {method} {self._calls[method]}")}
        try:
            return self.model.apply({"params": of_model(self.params)}, *args, method=method, rngs=rngs, **options)
        except (flax.errors.FlaxError, TypeError, ValueError) as error:
            if self._owner == "the model":
                raise
            reason = str(error).splitlines()[0]
            raise UserError(f"{WHERE}: {self._owner} cannot read these rows, see `inputs`: {reason}") from error

    def part(self, name: str, module: nn.Module, *args: Any, **options: Any) -> Any:
        """Calls a module of the term's own; without parameters of that name yet, makes them from these inputs."""
        own = self.params.get(OWN, {}).get(self._scope, {})
        if name not in own and self._made is not None:
            own = self._made.setdefault(self._scope, {})
            if name not in own:
                own[name] = module.init(fold(self._rng, f"{self._scope} {name}"), *args, **options).get("params", {})
        if name not in own:
            raise UserError(
                f"{WHERE}: {self._owner} has no parameters {OWN}/{self._scope}/{name}; expected a teacher that is an "
                "average, `decay=0.999`, of these, too"
            )
        return module.apply({"params": own[name]}, *args, **options)

    def teacher(self, name: str) -> "Outputs":
        """Returns the same rows under a teacher: no gradient, no dropout."""
        if name not in self._teachers:
            known = ", ".join(self._teachers) or "none"
            raise UserError(f"{WHERE}: `{self._user}` asks for the teacher `{name}`; {WHERE}.teachers has: {known}")
        if name not in self._taught and self._teachers[name] is None:
            stored = {key.removeprefix(f"{name}/"): row for key, row in self.rows.items() if key.startswith(f"{name}/")}
            if self.rows and not stored:
                raise UserError(
                    f"{WHERE}.teachers.{name} is stored, and the batch has no `{name}/...`, from "
                    f"config.data.reinforced; it has: {', '.join(self.rows)}"
                )
            self._taught[name] = Outputs(None, {}, stored, keys=self.keys)
            self._taught[name]._owner = f"the stored teacher `{name}`"
        if name not in self._taught:
            model, params, inputs = self._teachers[name]
            lacks = [row for row in inputs.values() if self.rows and row not in self.rows]
            if lacks:
                raise UserError(f"{WHERE}.teachers.{name} reads `{lacks[0]}`; the batch has: {', '.join(self.rows)}")
            rows = {**self.rows, **{key: self.rows[row] for key, row in inputs.items() if row in self.rows}}
            params = jax.lax.stop_gradient(params)
            self._taught[name] = Outputs(model, params, rows, keys=self.keys, made=self._made)
            self._taught[name]._rng, self._taught[name]._owner = self._rng, f"the teacher `{name}`"
        return self._taught[name].of(self._scope)

    def on(self, **rows: Any) -> "Outputs":
        """Returns a view on other rows, such as more texts: `outputs.on(token_ids=ids)["text_embedding"]`."""
        view = copy.copy(self)
        view.rows, view.keys, view._memo, view._taught = rows, None, {}, {}
        view._calls = collections.Counter()
        return view

    def of(self, scope: str) -> "Outputs":
        """Returns a view for one term, which shares what was computed."""
        view = copy.copy(self)
        view._user, view._scope, view._calls = self._user or scope, scope, collections.Counter()
        return view

    def fork(self) -> "Outputs":
        """Returns a copy that knows what was computed; what is computed in the copy stays there."""
        view = copy.copy(self)
        view._memo, view._taught = dict(self._memo), {name: taught.fork() for name, taught in self._taught.items()}
        return view
