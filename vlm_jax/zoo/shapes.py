"""The shapes of a model's parameters, from its config section, within limits."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax import models
from vlm_jax.data.tokenizers import guard
from vlm_jax.errors import UserError
from vlm_jax.params.table import named_leaves

MAX_SIZE = 2**24  # of any number of a model, such as a vocabulary
MAX_SIZES = {"depth": 1000, "image_size": 2**16, "experts": 2**12}


def param_shapes(section: Mapping[str, Any], positions: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns parameter name -> shape and dtype of the model that a config section describes.

    Args:
      section: the section.
      positions: rows of the image tower's position table, for a section without image_size.
    """
    return shapes_of(models.build(section), positions)


def shapes_of(model: nn.Module, positions: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns parameter name -> shape and dtype of a model; `positions` as for `param_shapes`."""
    return dict(_initial(model, inputs_of(model, positions)))


def inputs_of(model: nn.Module, positions: int | None = None) -> tuple[jax.ShapeDtypeStruct | None, ...]:
    """Returns the shapes of one input for each argument of a model; `positions` as for `param_shapes`."""
    if isinstance(model, models.ManyTower):
        return tuple(_input_of(tower) for tower in model.towers)
    if "write" in model.can:
        return jax.ShapeDtypeStruct((1, 1), jnp.int32), _input_of(model.decoder)
    reader = getattr(model, "text", None) or getattr(model, "decoder", None)
    return tuple(_input_of(tower, positions) for tower in (model.image, reader))


def towers_alone(section: Mapping[str, Any], shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `section` and `shapes` of the two towers of a `TwoTowerCaptioner`, from those of the model."""
    kept = {key: value for key, value in section.items() if key != "decoder"} | {"name": "two_tower"}
    own = {name: leaf for name, leaf in shapes.items() if not name.startswith(("decoder/", "head/"))}
    return dict(section=kept, shapes=own)


def check_sizes(section: Any, where: str = "the model", largest: int = MAX_SIZE) -> None:
    """Raises a UserError if a config from elsewhere has sizes that tracing the model could not finish with."""
    if isinstance(section, Mapping):
        for key, value in section.items():
            check_sizes(value, f"{where}.{key}"[:100], MAX_SIZES.get(key, MAX_SIZE))
            if key == "where" and isinstance(value, str) and guard.backtracks(value):
                raise UserError(f"{where}.where is a regex that may run for hours, {value[:60]!r}")
        sides, patch = section.get("image_size"), section.get("patch", 16)
        height, width = sides if isinstance(sides, list | tuple) and len(sides) == 2 else (sides, sides)
        if all(isinstance(n, int) and n > 0 for n in (height, width, patch)):
            check_sizes((height // patch) * (width // patch), f"{where}: the number of patches")
    elif isinstance(section, list | tuple):
        for value in section:
            check_sizes(value, where, largest)
    elif isinstance(section, int | float) and not -largest <= section <= largest:
        raise UserError(f"{where} is {section!r:.40}; expected at most {largest:,}")


def _input_of(tower: Any, positions: int | None = None) -> jax.ShapeDtypeStruct | None:
    """Returns the shape of one input of a tower: a text, or a picture of `positions` patches without image_size."""
    if tower is None:
        return None
    if hasattr(tower, "length"):
        return jax.ShapeDtypeStruct((1, tower.length), jnp.int32)
    patch, size = getattr(tower, "patch", 32), getattr(tower, "image_size", None)
    if size is None:  # a strip of as many patches as there are positions
        covers_cls = getattr(tower, "cls_position", False)
        size = patch, patch * max((positions or 1) - covers_cls, 1)
    height, width = (size, size) if isinstance(size, int) else size
    return jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)


@functools.lru_cache(maxsize=8)  # what is loaded, saved or converted is asked for several times; tracing takes seconds
def _initial(model, inputs):
    return named_leaves(jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"])
