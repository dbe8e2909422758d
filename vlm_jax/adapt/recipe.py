"""Recipes: the parameters that train, how they change the model (effective = combine(base, own)), by which losses."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from vlm_jax.models import insertion
from vlm_jax.models.insertions.prompts import Context
from vlm_jax.objectives import Teacher, Term, of_model
from vlm_jax.params import masks
from vlm_jax.params.table import named_leaves


class Recipe(Protocol):
    """Own parameters that train, and their effect on the model."""

    def insertions(self, model: nn.Module, at: int) -> tuple:
        """Returns the modules to insert into the model; `at` is the place of a context in texts."""

    def begin(self, rng: jax.Array, model: nn.Module, leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns the initial own parameters; `leaves` are the model's parameters with insertions."""

    def combine(self, own: Mapping[str, jax.Array], leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns the changed parameters of the model, by name."""


@dataclasses.dataclass(frozen=True, eq=False)
class Extended:
    """A recipe with more than the loss of the classes.

    Attributes:
      recipe: the parameters that train.
      terms: more terms, beside the one called "classes". The row sets are "batch" (`image`, `label`: -1 for padding),
        "classes" (`token_ids` or `text_embedding`, and `zero_shot`, the base model's embeddings of the classes by all
        templates) and, with a pool, "pool" (`image`). The teacher "base" is the base model. Or `f(known) -> terms`, for
        terms that have parameters for each class.
      tables: name -> `f(known) -> [C, ...]`, arrays that stand in the rows of "classes", made once by the base model,
        see `adapt.tables`.
      gradients: what happens to the terms' gradients instead of their sum, `Objective.combine`.
      optimizer: keys of an optimizer section that differ from `tune`'s.
      average: `f(share of the training) -> weight`: the result is the weighted mean of the parameters at the ends of
        epochs; None: the last ones.
      names_classes: whether "classes", the cross-entropy over the names, is a term.
      teachers: more teachers, such as averages of the recipe's own parameters.
      head: the term whose part "head", a kernel and a bias, is the classifier of the result, see `tuning.classifier`.
      noise: `noise(rng, own, start) -> own`: the parameters that the model has in training; see `start`.
      of_task: `of_task(base, images, labels, names) -> Extended`: the recipe for these pictures, see `tune`.
      finish: `finish(base, tuned) -> tuned`: what becomes of the tuned model.
      first: `first(this, look) -> Extended`: the recipe after a look at the task, such as a tuning or gradients of some
        batches, see `tune.Look`.
    """

    recipe: Recipe
    terms: tuple[Term, ...] | Callable[[Any], tuple[Term, ...]] = ()
    gradients: Callable | None = None
    optimizer: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tables: Mapping[str, Callable] = dataclasses.field(default_factory=dict)
    average: Callable[[float], float] | None = None
    names_classes: bool = True
    teachers: Mapping[str, Teacher] = dataclasses.field(default_factory=dict)
    head: str | None = None
    noise: Callable | None = None
    of_task: Callable | None = None
    finish: Callable | None = None
    first: Callable | None = None

    def insertions(self, model, at):
        return self.recipe.insertions(model, at)

    def begin(self, rng, model, leaves):
        return self.recipe.begin(rng, model, leaves)

    def combine(self, own, leaves):
        return self.recipe.combine(own, leaves)

    def start(self, leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns the own parameters that the base model has; the recipe is a `Masked`."""
        return self.recipe.begin(None, None, leaves)


def sees_pool(recipe: Recipe) -> bool:
    """Returns whether a term of the recipe sees pictures without labels."""
    terms = getattr(recipe, "terms", ())
    return not callable(terms) and any("pool" in term.sets for term in terms)


def may_see_pool(recipe: Recipe) -> bool:
    """Returns whether a term sees pictures without labels, or only `tune` knows whether one does."""
    return sees_pool(recipe) or callable(getattr(recipe, "terms", ())) or bool(getattr(recipe, "of_task", None))


class Adapted:
    """A model as a function of a recipe's own parameters, for objectives; `leaves` are the base parameters by name."""

    def __init__(self, model: nn.Module, recipe: Recipe, leaves: Mapping[str, jax.Array]):
        self.model, self.recipe, self.leaves = model, recipe, leaves

    def __getattr__(self, name):
        return getattr(self.model, name)

    def effective(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the parameters of the model."""
        return tree({**self.leaves, **self.recipe.combine(of_model(own), self.leaves)})

    def apply(self, variables: Mapping[str, Any], *args: Any, rngs: Any = None, **options: Any) -> Any:
        own, noise = of_model(variables["params"]), getattr(self.recipe, "noise", None)
        if rngs and noise:
            own = noise(jax.random.fold_in(rngs["dropout"], 1), own, self.recipe.start(self.leaves))
        return self.model.apply({"params": self.effective(own)}, *args, rngs=rngs, **options)


class Inserted(NamedTuple):
    """Insertions of `vlm_jax.models.insertion`; `tune` says where a `Context` stands."""

    modules: tuple

    def insertions(self, model, at):
        return tuple(m._replace(at=at) if isinstance(m, Context) else m for m in self.modules)

    def begin(self, rng, model, leaves):
        return insertion.new_leaves(leaves)

    def combine(self, own, leaves):
        return dict(own)


class Masked(NamedTuple):
    """Trains parameters, or parts of them down to single scalars, by the mask `masks.trainable`: "bias", "last_1", ...

    Attributes:
      trainable: the mask, of the model's own parameters and of those of `modules`.
      modules: insertions; what does not train of their parameters is 0.
    """

    trainable: str | Sequence[tuple[str, Any]]
    modules: tuple = ()

    def insertions(self, model, at):
        return self.modules

    def begin(self, rng, model, leaves):
        chosen = self._chosen(leaves)
        return {
            name: leaf if chosen[name] is ... else leaf[chosen[name]] for name, leaf in leaves.items() if name in chosen
        }

    def combine(self, own, leaves):
        chosen = self._chosen(leaves)
        rest = {name: jnp.zeros_like(leaf) for name, leaf in insertion.new_leaves(leaves).items()}
        replace = lambda leaf, index, value: value if index is ... else leaf.at[index].set(value)
        return rest | {name: replace(rest.get(name, leaves[name]), chosen[name], value) for name, value in own.items()}

    def _chosen(self, leaves):
        """Name -> the index of the part that trains, see `masks.chosen`."""
        mask = named_leaves(masks.trainable(tree(leaves), self.trainable))
        return {name: masks.chosen(m, leaves[name].shape) for name, m in mask.items() if np.any(m)}


def tree(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """{"image/head/kernel": x} -> {"image": {"head": {"kernel": x}}}."""
    return unflatten_dict(dict(leaves), sep="/")
