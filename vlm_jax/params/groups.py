"""The optimizer's parameter table: what each parameter gets."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlm_jax import config
from vlm_jax.errors import UserError
from vlm_jax.params import layers, masks
from vlm_jax.params.table import match_rules, named_leaves

FROZEN = "frozen"


class Group(NamedTuple):
    """What one parameter gets. Parameters with equal words (see `describe`) share one transform.

    Attributes:
      rule: name of its rule in messages.
      lr: multiplier of the learning rate.
      by_layer: a further multiplier, of the parameter's layer, or an array [layers, 1, ...] in a scanned stack; None if
        the rule does not differ by layer.
      wd: multiplier of the weight decay.
      mask: what trains: True, False, or bools that broadcast to the parameter.
      schedule: section of a schedule; None for the optimizer's.
      transform: sections of gradient transformations.
      shrink: threshold towards 0 after each step, see `transforms.shrink`; None: no threshold.
      budget: section of a budget of ranks, see `rank_budget.allocated`; None: all ranks stay.
      sparse: share of the scalars that are 0, see `masks.drawn`; 0: none.
    """

    rule: str
    lr: float
    by_layer: float | np.ndarray | None
    wd: float
    mask: bool | np.ndarray
    schedule: Mapping[str, Any] | None
    transform: tuple
    shrink: float | Mapping[str, Any] | None = None
    budget: Mapping[str, Any] | None = None
    sparse: float = 0.0


def read(rules: Sequence[tuple[str, Mapping[str, Any]]], params: Any, where: str) -> dict[str, Group]:
    """Returns `{name: Group}` of a parameter table with the options of `optim.build`; params are arrays or shapes.

    Raises:
      UserError: as `match_rules`; an option is unknown or does not fit; nothing trains.
    """
    leaves, places = named_leaves(params), layers.places(params)
    label = lambda regex: f"{where}[{regex!r}]"
    rules = [(regex, config.call(_rule, options, label(regex), rule=label(regex))) for regex, options in rules]
    matched = match_rules(rules, leaves, where=where)
    groups = {}
    for _, rule in rules:
        names = [name for name in leaves if matched[name] is rule]
        trained = _masks(rule, names, params)
        if names and rule["layer_decay"] and not any(places[name].depth for name in names):
            raise UserError(f"{rule['rule']}.layer_decay: no parameter of the rule is in a tower with `blocks`")
        for name in names:
            wd = float(name.split("/")[-1] == "kernel") if rule["wd"] is None else rule["wd"]
            lr, by_layer = _rates(rule, name, places[name])
            options = (rule[key] for key in ("schedule", "transform", "shrink", "budget", "sparse"))
            groups[name] = Group(rule["rule"], lr, by_layer, wd, trained[name], *options)
    if not any(np.any(group.mask) for group in groups.values()):
        raise UserError(f"{where} freezes every parameter; nothing is left to train")
    return {name: groups[name] for name in leaves}


def _rule(
    *,
    rule: str,
    lr: float | Sequence[float] = 1.0,
    layer_decay: float | None = None,
    wd: float | None = None,
    freeze: bool = False,
    only: Any = True,
    schedule: Mapping[str, Any] | None = None,
    transform: Any = (),
    shrink: float | Mapping[str, Any] | None = None,
    budget: Mapping[str, Any] | None = None,
    sparse: float = 0.0,
) -> dict[str, Any]:
    """The options of one rule."""
    if not 0 <= sparse < 1:
        raise UserError(f"{rule}.sparse is {sparse}; expected the share of zeros, 0 to below 1")
    if sparse and (freeze or only is not True):
        raise UserError(f"{rule} has sparse={sparse} beside freeze or only; zeros are of parameters that train whole")
    if min(np.ravel(lr), default=1) <= 0:
        raise UserError(f"{rule}.lr is {lr}; expected a multiplier above 0, or use freeze=True")
    if layer_decay is not None and layer_decay <= 0:
        raise UserError(f"{rule}.layer_decay is {layer_decay}; expected a number above 0, e.g. 0.75")
    return {
        "rule": rule,
        "lr": lr,
        "layer_decay": layer_decay,
        "wd": wd,
        "only": False if freeze else only,
        "schedule": dict(schedule) if schedule else None,
        "transform": tuple(transform) if isinstance(transform, list | tuple) else (transform,),
        "shrink": shrink,
        "budget": budget,
        "sparse": sparse,
    }


def _masks(rule, names, params):
    """Returns the masks of the rule's parameters, by name."""
    only = rule["only"]
    if isinstance(only, bool):
        return dict.fromkeys(names, only)
    is_rule = lambda entry: isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[0], str)
    is_table = isinstance(only, list | tuple) and all(map(is_rule, only))
    if not (isinstance(only, str) or is_table):
        only = [*((re.escape(name), only) for name in names), (".*", False)]
    trained = named_leaves(masks.trainable(params, only, where=f"{rule['rule']}.only"))
    if names and not any(np.any(trained[name]) for name in names):
        raise UserError(f"{rule['rule']}.only trains no parameter of the rule; use freeze=True")
    return trained


def _rates(rule, name, place):
    """Returns the multiplier of the parameter, and that of its layers or None."""
    lr, by_layer = rule["lr"], None
    if np.ndim(lr):
        in_blocks = np.all((place.layer >= 1) & (place.layer <= place.depth))
        if not in_blocks or len(lr) != place.depth:
            side = "in" if in_blocks else "outside"
            raise UserError(
                f"{rule['rule']}.lr has {len(lr)} multipliers, one for each block; `{name}` is {side} a stack of "
                f"{place.depth} blocks"
            )
        lr, by_layer = 1.0, np.asarray(lr, float)[place.layer - 1]
    if rule["layer_decay"]:
        by_layer = (1.0 if by_layer is None else by_layer) * rule["layer_decay"] ** (place.depth + 1.0 - place.layer)
    return lr, by_layer


def describe(group: Group, size: int = 1) -> str:
    """Returns what a parameter of `size` scalars gets, in words: "frozen", or "lr ..., wd ..., <count> frozen"."""
    if not np.any(group.mask):
        return FROZEN
    rates = np.ravel(group.lr if group.by_layer is None else group.lr * group.by_layer)
    lr = f"{rates[0]:.12g}" if group.by_layer is None else f"{rates[0]:.4g}"
    lr += f" to x{rates[-1]:.4g} by layer" if len(rates) > 1 else ""
    curve = ", " + " ".join(f"{k}={v}" for k, v in group.schedule.items()) if group.schedule else ""
    frozen = size - masks.size(group.mask, size)
    rest = f", {frozen:,} {FROZEN}" if frozen else ""
    less = group.shrink if isinstance(group.shrink, Mapping) else {"value": group.shrink}
    less = "" if group.shrink is None else ", shrink" + "".join(f" {k}={v}" for k, v in less.items())
    ranks = "" if group.budget is None else ", budget" + "".join(f" {k}={v}" for k, v in group.budget.items())
    zeros = f", {100 * group.sparse:g} % zeros" if group.sparse else ""
    rates = f"lr x{lr}, wd x{group.wd:.12g}{curve}{''.join(map(_step, group.transform))}"
    return f"{rates}{less}{ranks}{zeros}{rest}"


def _step(transform: str | Mapping[str, Any]) -> str:
    """A gradient transformation in words: ", clip max_delta=1.0"."""
    if not isinstance(transform, Mapping):
        return f", {transform}"
    return f", {transform.get('name')}" + "".join(f" {k}={v}" for k, v in transform.items() if k != "name")
