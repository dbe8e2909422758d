"""Places computed prompts where the towers have their inserted prompts; prompts of both towers without a coupling."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax.adapt.recipe import Inserted, Recipe
from vlm_jax.errors import UserError
from vlm_jax.models.insertion import NEW, new_leaves
from vlm_jax.models.insertions.prompts import Context, Prompt
from vlm_jax.models.transformer import Encoder


def widths(model: Any) -> tuple[int, int]:
    """Returns the widths of the text tower and the image tower; raises a UserError unless both are transformers."""
    for tower in ("text", "image"):
        if not isinstance(getattr(model, tower, None), Encoder):
            raise UserError(f"prompts of both towers stand in two transformers; this model's {tower} tower is none")
    return model.text.width, model.image.width


def spread(tower: str, rows: jax.Array, leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Rows [J, n, D] as the inserted parameters of a tower: row j for block j, 0 for blocks from J on."""
    spread = {}
    for name, leaf in leaves.items():
        if not re.fullmatch(rf"{tower}/(.*/)?inserted_(context|prompt)", name):
            continue
        block = re.search(r"/blocks(?:_(\d+))?/", name)
        if block is None:
            spread[name] = rows[0]
        elif block[1] is None:
            spread[name] = jnp.zeros_like(leaf).at[: len(rows)].set(rows)
        else:
            spread[name] = rows[int(block[1])] if int(block[1]) < len(rows) else jnp.zeros_like(leaf)
    return spread


def common_depth(model: Any, depth: int) -> int:
    """Returns the depth, at most that of the shallower tower."""
    widths(model)
    return min(depth, model.text.depth, model.image.depth)


def deep(model: Any, length: int, depth: int, at: int) -> tuple:
    """Returns insertions for prompts in the first blocks of both towers: in the place of words, beside patches."""
    depth = common_depth(model, depth)
    return Context("text", length, at, depth), Prompt("image", length, depth)


class Independent(NamedTuple):
    """Prompts in the first J blocks of both towers, without a coupling: J n (D_text + D_image) parameters.

    Attributes:
      length: n.
      depth: J, capped at the number of blocks of the shallower tower.
      std: of all prompts at init.
    """

    length: int = 4
    depth: int = 9
    std: float = 0.02

    def insertions(self, model, at):
        return deep(model, self.length, self.depth, at)

    def begin(self, rng, model, leaves):
        shape = common_depth(model, self.depth), self.length
        sizes = zip(("text", "image"), widths(model), jax.random.split(rng), strict=True)
        return {tower: self.std * jax.random.normal(key, (*shape, width)) for tower, width, key in sizes}

    def combine(self, own, leaves):
        return spread("text", own["text"], leaves) | spread("image", own["image"], leaves)


class Visual(NamedTuple):
    """Prompts in the first J blocks of the image tower: J n D_image parameters; fields as of `Independent`."""

    length: int = 4
    depth: int = 1
    std: float = 0.02

    def insertions(self, model, at):
        return (Prompt("image", self.length, self.depth),)

    def begin(self, rng, model, leaves):
        return {"image": self.std * jax.random.normal(rng, (self.depth, self.length, widths(model)[1]))}

    def combine(self, own, leaves):
        return spread("image", own["image"], leaves)


class Joined(NamedTuple):
    """A recipe that computes parameters, and inserted modules that train as they are.

    Attributes:
      recipe: its own parameters have no name of an insertion.
      modules: more insertions.
    """

    recipe: Recipe
    modules: tuple

    def insertions(self, model, at):
        return (*self.recipe.insertions(model, at), *Inserted(self.modules).insertions(model, at))

    def begin(self, rng, model, leaves):
        own = self.recipe.begin(rng, model, leaves)
        computed = self.recipe.combine(own, leaves)
        return own | {name: leaf for name, leaf in new_leaves(leaves).items() if name not in computed}

    def combine(self, own, leaves):
        modules = {name: leaf for name, leaf in own.items() if re.fullmatch(NEW, name)}
        return self.recipe.combine({name: own[name] for name in own if name not in modules}, leaves) | modules
