"""The methods that adapt a model to a few labelled pictures: `fit(NAME)(base, shots, validation, task, **options)`.

A method is declared in the folder of its family: `heads`, `parameters.py` and `tuning`, `modules`, `prompts`. A fit
returns the adapted `Pretrained` and chooses hyper-parameters on the validation pictures.
"""

import dataclasses
import inspect
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, Protocol, runtime_checkable

from vlm_jax import catalogue, config
from vlm_jax.adapt.heads.search import choose
from vlm_jax.adapt.recipe import may_see_pool
from vlm_jax.adapt.task import Shots, Task, accuracy
from vlm_jax.adapt.tune import tune
from vlm_jax.errors import DivergedError, UserError
from vlm_jax.pretrained import Pretrained

TRAINED = ("parameters", "modules", "prompts")  # families whose methods change the model
FAMILIES = ("heads", *TRAINED)
LEARNING_RATES = [1e-3, 1e-2]
WHERE = "an option of the method"


@runtime_checkable
class Fits(Protocol):
    """A recipe that does not train by `tune`."""

    def fit(self, base: Pretrained, shots: Shots, validation: Shots, task: Task, **training: Any) -> Pretrained:
        """Returns the adapted model."""


def fit(name: str) -> Callable[..., Pretrained]:
    """Returns a method by name, `(base, shots, validation, task, **options) -> Pretrained`.

    Options are the method's own options; methods that train the model also take the options of `search_rate`.

    Raises:
      UserError: there is no such method.
    """
    make = catalogue.get(FAMILIES, name, "a method of few_shot")
    return partial(fit_head if is_head(name) else fit_recipe, make)


def is_head(name: str) -> bool:
    """Returns whether a method is a classifier on cached features."""
    return catalogue.family(FAMILIES, name) == "heads"


def options_of(names: Collection[str], options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the options of each method: {"steps": 100, "lora.rank": 8} has the rank of lora alone.

    Raises:
      UserError: an option is of a method that is not among `names`, or a method has no such option.
    """
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in sorted(options.items(), key=lambda item: "." in item[0]):  # a method's own option wins
        method, dot, option = key.partition(".")
        if dot:
            config.choose(found, method, f"the method of the option `{key}`")[option] = value
        else:
            for own in found.values():
                own[key] = value
    for name, own in found.items():
        _check_options(name, own)
    return found


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    takers = [catalogue.get(FAMILIES, name, "a method of few_shot"), *([] if is_head(name) else [search_rate])]
    taken = [p for taker in takers for p in inspect.signature(taker).parameters.values()]
    known = {p.name: p for p in taken if p.kind is p.KEYWORD_ONLY}
    for key, value in options.items():
        if key not in known:
            raise UserError(catalogue.unknown(f"the method {name} has no option `{key}`", key, known))
        config.check_number(known[key], value, f"the method {name}")
        if known[key].annotation in (int, int | None):
            config.check_least(0 if known[key].default == 0 else 1, name, **{key: value})
        if key in ("learning_rate", "weight_decay"):
            config.check_least(0, name, **{key: value})


def fit_head(
    make: Callable, base: Pretrained, shots: Shots, validation: Shots, task: Task, **options: Any
) -> Pretrained:
    """Makes a head from cached features; chooses the options that `make` `searches` on validation features.

    Given options are not searched. `make` may take features, labels, text, scale, `reference` (the validation
    features) and `pool` (those of pictures without labels). If `make` takes neither features nor a pool, the model
    itself is the classifier and has no head.
    """
    parameters = inspect.signature(make).parameters
    given = dict(
        features=shots.features, labels=shots.labels, text=task.text, scale=task.scale, reference=validation.features
    )
    if "pool" in parameters:
        given["pool"] = task.unlabelled(make.__name__).features
    given = {name: value for name, value in given.items() if name in parameters}
    build = lambda **chosen: config.call(make, options | chosen, WHERE, **given)
    best = lambda build, grid: choose(
        build, {k: v for k, v in grid.items() if k not in options}, validation.features, validation.labels
    )
    head, found = None, {}
    for grid in getattr(make, "grids", ()) or ({},):
        choice = best(partial(build, **found), grid)
        head, found = choice.head, found | choice.parameters
    if refine := getattr(make, "refine", None):
        head = best(head._replace, refine).head
    head = head if {"features", "pool"} & given.keys() else None
    return dataclasses.replace(base, classes=tuple(task.names), templates=tuple(task.templates), head=head)


def fit_recipe(
    make: Callable,
    base: Pretrained,
    shots: Shots,
    validation: Shots,
    task: Task,
    **options: Any,
) -> Pretrained:
    """Trains the recipe `make(model, **its own options)`; the other options go to `search_rate` or the recipe's fit."""
    own = inspect.signature(make).parameters
    trains = inspect.signature(search_rate).parameters
    recipe = config.call(
        make, {k: v for k, v in options.items() if k in own or k not in trains}, WHERE, model=base.model
    )
    training = {name: value for name, value in options.items() if name not in own}
    run = recipe.fit if isinstance(recipe, Fits) else partial(search_rate, recipe)
    return config.call(run, training, WHERE, base=base, shots=shots, validation=validation, task=task)


def search_rate(
    recipe: Any,
    base: Pretrained,
    shots: Shots,
    validation: Shots,
    task: Task,
    *,
    steps: int = 200,
    batch_size: int = 32,
    learning_rate: float | None = None,
    weight_decay: float = 0.0,
) -> Pretrained:
    """Tunes by a recipe, see `best_rate`.

    A recipe with a term on "pool" gets the pictures of `task.pool`.
    """
    pool = task.pool.images if task.pool and may_see_pool(recipe) else None
    train = lambda rate: tune(
        base, recipe, shots.images, shots.labels, task.names, templates=task.templates, steps=steps,
        batch_size=batch_size, learning_rate=rate, weight_decay=weight_decay, pool=pool, seed=task.seed,
    )  # fmt: skip
    return best_rate(train, learning_rate, base, validation, task)


def best_rate(
    train: Callable[[float], Pretrained],
    learning_rate: float | None,
    base: Pretrained,
    validation: Shots,
    task: Task,
) -> Pretrained:
    """Returns `train(rate)` at the given rate, by default at that of `LEARNING_RATES` that is best on validation."""
    best = failed = None
    for rate in LEARNING_RATES if learning_rate is None else [learning_rate]:
        try:
            adapted = train(rate)
        except DivergedError as error:
            failed = error
            continue
        share = accuracy(base, adapted, validation, task.names)
        if best is None or share > best[0]:
            best = share, adapted
    if best is None:
        raise failed
    return best[1]
