"""Inserts modules into an existing, unchanged model: adapters, low rank, prefixes, prompts, contexts.

    adapted = inserted(model, Adapter(where=r"image/.*/mlp", width=32), LowRank())
    params = begin(rng, adapted, params, images, token_ids)   # the model's parameters and the new ones

In a config: `model.insertions=[dict(type="LowRank", rank=4)]` with `optimizer.params=insertion.TABLE`; `model_init`
names the initial model. The result is a model of a subclass of the same class. The parameter tree holds a new parameter
beside the module that the insertion changes (`image/blocks/mlp/inserted_down`; stacked for scanned blocks). Optimizer
tables, partition rules and checkpoints treat new parameters like all others; `NEW` matches the names. Adapters follow
the unified view of He et al. 2022 (arXiv:2110.04366): h <- h + s dh, where dh reads a module's output (serial) or its
input (parallel).
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from vlm_jax import catalogue, config
from vlm_jax.errors import UserError
from vlm_jax.params.table import check_alike, named_leaves

NEW = r"(.*/)?inserted_.*"
TABLE = ((NEW, {}), (".*", dict(freeze=True)))
"""The optimizer's parameter table that trains only the new parameters."""


def of_sections(sections: Sequence[Mapping[str, Any]], where: str) -> tuple:
    """Builds insertions from a config: [dict(type="LowRank", rank=4), ...]; `type` is the name of an insertion.

    A list of such sections in a section becomes a tuple of insertions, any other list a tuple.
    """
    insertions = []
    for section in sections:
        fields = dict(section)
        for key, value in fields.items():
            if isinstance(value, list | tuple):
                nested = bool(value) and all(isinstance(one, Mapping) for one in value)
                fields[key] = of_sections(value, f"{where}.{key}") if nested else tuple(value)
        kind = catalogue.get("insertions", fields.pop("type", None), f"the type of {where}")
        insertions.append(config.call(kind, fields, where))
    return tuple(insertions)


def sections_of(insertions: Sequence[Any]) -> list[dict[str, Any]]:
    """Returns the config of insertions, from which `of_sections` builds them."""
    plain = lambda value: (
        sections_of(value) if isinstance(value, tuple) and value and hasattr(value[0], "_asdict") else value
    )
    return [{"type": type(m).__name__, **{key: plain(value) for key, value in m._asdict().items()}} for m in insertions]


def inserted(model: nn.Module, *insertions: Any) -> nn.Module:
    """Returns the model with more insertions, as a subclass of the model's class; earlier insertions stay."""
    return _with(model, (*getattr(model, "insertions", ()), *insertions))


def removed(model: nn.Module) -> nn.Module:
    """Returns the model without insertions."""
    return type(model).__bases__[0](**_fields(model)) if hasattr(model, "insertions") else model


def _with(model, insertions):
    return _class(type(removed(model)))(**_fields(model), insertions=insertions)


def _fields(model):
    skipped = ("parent", "name", "insertions")
    return {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.init and f.name not in skipped}


def begin(rng: jax.Array, model: nn.Module, params: Any, *inputs: Any) -> Any:
    """Returns the parameters of a model with insertions: `params`, and new parameters drawn with rng.

    Args:
      rng: a `jax.random.key`.
      model: the result of `inserted`.
      params: parameters of the model without insertions.
      inputs: inputs of the model; only their shapes and dtypes matter.

    Raises:
      UserError: an insertion matches no module, or the parameters belong to another model.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)

    @jax.jit  # traced once, for the shapes and for the new parameters
    def init(rng):
        return model.init(rng, *jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))["params"]

    begun = jax.eval_shape(init, rng)
    new = new_leaves(begun)
    check_alike({name: leaf for name, leaf in named_leaves(begun).items() if name not in new}, named_leaves(params))
    for insertion in model.insertions:
        if len(model.insertions) > 1:
            new = new_leaves(jax.eval_shape(_with(model, (insertion,)).init, rng, *shapes)["params"])
        if not new:
            raise UserError(f"{insertion} changes nothing: its `where` matches no module of the model")
    draw = jax.jit(lambda rng: new_leaves(init(rng)))  # jit drops the model's own parameters
    return unflatten_dict(named_leaves(params) | draw(rng), sep="/")


def new_leaves(params: Any) -> dict[str, jax.Array]:
    """Returns the parameters of insertions, by name."""
    return {name: leaf for name, leaf in named_leaves(params).items() if re.fullmatch(NEW, name)}


def by_place(params: Any) -> dict[str, dict[str, jax.Array]]:
    """Returns the parameters of insertions, {the module's path: {name without "inserted_": parameter}}."""
    places: dict[str, dict[str, jax.Array]] = {}
    for name, leaf in new_leaves(params).items():
        place, _, own = f"/{name}".rpartition("/inserted_")
        places.setdefault(place[1:], {})[own] = leaf
    return places


def merge(params: Any, insertions: tuple) -> Any:
    """Returns the parameters of the plain model that computes the same, each insertion folded into kernels.

    An insertion that can be folded has `merged(kernel, new) -> kernel`; `new` are its parameters at the place of the
    kernel, without "inserted_".

    Raises:
      UserError: an insertion is no change of kernels, or two of them change one kernel.
    """
    for one in insertions:
        if not hasattr(one, "merged"):
            raise UserError(f"{one} is no change of kernels; merge folds LowRank and its like")
    leaves, kernels = named_leaves(params), {}
    for place, own in by_place(params).items():
        owners = [one for one in insertions if re.fullmatch(one.where, place)]
        if len(owners) != 1 or f"{place}/kernel" not in leaves:
            raise UserError(f"merge needs one insertion for each kernel; `{place}` has {len(owners)}: {owners}")
        kernels[f"{place}/kernel"] = owners[0].merged(leaves[f"{place}/kernel"], own)
    new = new_leaves(params)
    return unflatten_dict({name: leaf for name, leaf in (leaves | kernels).items() if name not in new}, sep="/")


@functools.cache
def _class(base: type) -> type:
    class Inserted(base):
        insertions: tuple = ()

        @nn.nowrap
        def init(self, *args, **kwargs):
            with nn.intercept_methods(functools.partial(_intercept, self.insertions)):
                return super().init(*args, **kwargs)

        @nn.nowrap
        def apply(self, *args, **kwargs):
            with nn.intercept_methods(functools.partial(_intercept, self.insertions)):
                return super().apply(*args, **kwargs)

    Inserted.__name__ = Inserted.__qualname__ = f"Inserted{base.__name__}"
    return Inserted


def _intercept(insertions, call, args, kwargs, context):
    module, method = context.module, context.method_name
    for insertion in insertions:
        if insertion.takes(module, method):
            path = insertion.path(module) if hasattr(insertion, "path") else module.path
            if re.fullmatch(insertion.where, "/".join(path)):
                call = functools.partial(insertion, call, module)
    return call(*args, **kwargs)


def new_parameter(module, name, init, shape):
    """Returns a new parameter in a module's scope; scans slice and initialise it like the module's own parameters."""
    return module.scope.param(f"inserted_{name}", init, shape)


def dot(x, matrix):
    """Returns x @ matrix, in the dtype of x."""
    return jnp.matmul(x, matrix.astype(x.dtype))
