"""The optimizer: one gradient transformation from a parameter table, schedules and any optax transform."""

import inspect
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vlm_jax import config
from vlm_jax.errors import UserError, near
from vlm_jax.params import masks, schedules, transforms
from vlm_jax.params.groups import FROZEN, describe, read
from vlm_jax.params.rank_budget import allocated
from vlm_jax.params.table import map_with_name, named_leaves

WHERE = "config.optimizer"
UNREACHED = f"{FROZEN}: no term reaches it"
duration_to_steps = schedules.duration_to_steps


def build(
    section: Mapping[str, Any],
    params: Any,
    total_steps: int,
    steps: Callable[[int | str], int] | None = None,
    reach: Mapping[str, Hashable] | None = None,
) -> tuple[optax.GradientTransformationExtraArgs, dict[str, str], schedules.Schedule]:
    """Returns (tx, table, schedule_fn) of an optimizer section.

    Section keys:
      name: "adamw", "adafactor" (the variant of the published ViT runs), "lion", "muon", "sgd", or the name of any
        `optax` function that takes `learning_rate`.
      lr: peak learning rate.
      schedule: see `schedules.build`; defaults to cosine to 0 without warm-up.
      weight_decay: decoupled weight decay, `w` below; defaults to 0.
      decay: the multiplier of the decay. "lr" (default): p <- p - lr(t) w p, the convention of torch and optax;
        lr(t) includes the schedule and the group's multiplier. "schedule" (default for adafactor):
        p <- p - schedule(t) w p, independent of the learning rate (Loshchilov & Hutter 2019, Algorithm 2; the published
        SigLIP, LiT and CapPa runs).
      clip_norm: clips the gradients of the trained parameters to this global norm.
      params: the parameter table: `(regex, options)` pairs, first match wins, every parameter must match. Options:
        lr: multiplier of the learning rate (1.0), or a list of one for each block of the tower, first block first.
        layer_decay: d multiplies the rate of layer i of a tower of n blocks by d ** (n + 1 - i). Embeddings are layer
          0, blocks 1 to n, later modules n + 1, as in the code of BEiT (arXiv:2106.08254, appendix) and MAE: the last
          block has d, the head 1. In a scanned stack each row has its rate. The decay of `decay="lr"` follows.
        wd: multiplier of the weight decay; defaults to 1.0 for parameters named `kernel` and to 0.0 for all others.
        freeze: True keeps the parameter bit for bit, without optimizer state.
        only: trains a part of the parameter: bools that broadcast to the parameter, or what `masks.trainable` reads
          ("last_1", a table, a file of masks). The rest stays bit for bit, with moments 0.
        schedule: overrides the section's schedule for this group.
        transform: gradient transformations of optax, after `clip_norm` and before the optimizer: one or a list of
          "centralize", dict(name="clip", max_delta=1.0), dict(name="add_noise", eta=0.01, gamma=0.55, key=0), ...
          "ewc" is this project's.
          One that takes a norm over a tree (`clip_by_global_norm`) takes that of all parameters with equal options.
        shrink: after each step, the parameter moves towards 0 by so much, to 0 itself where it is smaller: the proximal
          step of an L1 penalty. A number, or dict(value=..., begin="50%", ...): see `schedules.window`.
        budget: dict(rank=..., ...): the mean rank that low-rank updates keep, by importance: see
          `rank_budget.allocated`.
        sparse: share of the scalars, drawn once by `masks.drawn`, that begin at 0 and stay there, with moments 0 (SPDF,
          arXiv:2303.10464). The mask is drawn again at each step and stored nowhere; moments and arithmetic are dense.
      All other keys go to the optax function by name (`b1`, `b2`, `eps`, `momentum`, `mu_dtype="bfloat16"`, ...).

    Args:
      section: as above.
      params: parameter tree, or its `jax.ShapeDtypeStruct`s.
      total_steps: number of optimizer steps of the run.
      steps: duration -> number of steps; without it, durations are in steps or percent.
      reach: name -> a key of `active`, or None for always, of the parameters that the loss reaches. Others get no
        gradient and stay as they are. None: all are reached always.

    Returns:
      tx: for `optax.apply_updates`; `tx.update` needs `params`, and `active`, key -> bool, if `reach` has keys. Where
        False, parameters and moments stay as they are, weight decay included; schedules go on.
      table: `{name: group}`, for `parameter_table.format_table`.
      schedule_fn: step -> learning rate of a group with multiplier 1.

    Raises:
      UserError: the section has an unknown, missing or unused key, or a rule that matches nothing.
    """
    make_schedule = lambda section, where: schedules.build(section, total_steps, steps, where)
    known = steps or (lambda duration: schedules.duration_to_steps(duration, total_steps=total_steps))
    window = lambda weight, where: schedules.window(weight, known, where)
    of_run = dict(make_schedule=make_schedule, window=window, steps=known)
    return config.call(_build, section, WHERE, tree=params, reach=reach, **of_run)


def _build(
    name: str,
    lr: float,
    *,
    tree: Any,
    reach: Mapping[str, Hashable] | None,
    make_schedule: Callable[[Mapping[str, Any], str], schedules.Schedule],
    window: Callable[[float | Mapping[str, Any], str], float | schedules.Schedule],
    steps: Callable[[int | str], int],
    schedule: Mapping[str, Any] | None = None,
    weight_decay: float = 0.0,
    decay: str | None = None,
    clip_norm: float | None = None,
    params: Sequence[tuple[str, Mapping[str, Any]]] = ((".*", {}),),
    **options,
):
    factory = transforms.optimizer(name, f"{WHERE}.name")
    _check_options(name, factory, options)
    decay = decay or ("schedule" if name == "adafactor" else "lr")
    config.choose({"lr": None, "schedule": None}, decay, f"{WHERE}.decay")
    main_schedule = make_schedule(schedule or {}, f"{WHERE}.schedule")

    groups = read(params, tree, f"{WHERE}.params")
    reach = dict.fromkeys(groups) if reach is None else reach
    rates = {leaf: group.by_layer for leaf, group in groups.items() if group.by_layer is not None}
    parts = {leaf: group.mask for leaf, group in groups.items() if np.ndim(group.mask)}

    label_of = {}  # parameter -> label in the optimizer state
    labels: dict[tuple, str] = {}  # (words, whether rates differ by layer, key of `active`) -> label
    shared = {FROZEN: transforms.hold()}
    for leaf, group in groups.items():
        if not np.any(group.mask) or leaf not in reach:
            label_of[leaf] = FROZEN
            continue
        known = (describe(group._replace(by_layer=None, mask=True, sparse=0.0)), leaf in rates, reach[leaf])
        label = label_of[leaf] = labels.setdefault(known, f"group{len(labels)}")
        if label in shared:
            continue
        curve = make_schedule(group.schedule, f"{group.rule}.schedule") if group.schedule else main_schedule
        wd = weight_decay * group.wd
        by_layer = transforms.scale(rates) if leaf in rates else None
        tx = _transform(factory, options, _times(lr * group.lr, curve), curve, wd, decay, by_layer)
        before = [transforms.transform(section, f"{group.rule}.transform") for section in group.transform]
        tx = optax.chain(*before, transforms.only(parts), tx) if before else tx
        if group.shrink is not None:
            tx = optax.chain(tx, transforms.shrink(window(group.shrink, f"{group.rule}.shrink")))
        if group.budget is not None:
            tx = allocated(tx, group.budget, steps, f"{group.rule}.budget")
        shared[label] = tx if reach[leaf] is None else _held(tx, reach[leaf])

    label_tree = map_with_name(lambda leaf, _: label_of[leaf], tree)
    trained = jax.tree.map(lambda label: label != FROZEN, label_tree)
    clip = [optax.masked(optax.clip_by_global_norm(clip_norm), trained)] if clip_norm else []
    first, last = ([transforms.only(parts)], [transforms.only(parts, rest=-0.0)]) if parts else ([], [])
    tx = optax.chain(*first, *clip, optax.partition(shared, label_tree), *last)
    if sparse := {leaf: group.sparse for leaf, group in groups.items() if group.sparse}:
        tx = transforms.sparse(tx, sparse)
    table = {leaf: describe(groups[leaf], math.prod(x.shape)) for leaf, x in named_leaves(tree).items()}
    table |= {leaf: UNREACHED for leaf in groups.keys() - reach.keys() if table[leaf] != FROZEN}
    return transforms.plain_keys(tx, tree), table, _times(lr, main_schedule)


def zeroed(section: Mapping[str, Any], params: Any) -> Any:
    """Returns the parameters that a run by an optimizer section begins with: `sparse` ones have their zeros."""
    rules = section.get("params") or ((".*", {}),)
    shares = {name: group.sparse for name, group in read(rules, params, f"{WHERE}.params").items()}
    if not any(shares.values()):
        return params
    draw = lambda name, p: jnp.where(masks.drawn(name, p.shape, shares[name]), p, jnp.zeros_like(p))
    return map_with_name(lambda name, p: draw(name, p) if shares[name] else p, params)


def _times(factor: float, curve: schedules.Schedule) -> schedules.Schedule:
    return lambda step: factor * curve(step)


def _transform(factory, options, lr, curve, weight_decay, decay, by_layer) -> optax.GradientTransformation:
    """One group's transform: the optax function with its learning rate, the decoupled weight decay, rates by layer."""
    fixed: dict[str, Any] = {"learning_rate": lr}
    builtin_decay = "weight_decay" in inspect.signature(factory).parameters
    if builtin_decay:
        fixed["weight_decay"] = weight_decay if decay == "lr" else 0.0
    steps = [factory(**options, **fixed)]
    if weight_decay and not (builtin_decay and decay == "lr"):
        steps.append(optax.add_decayed_weights(_times(-weight_decay, lr if decay == "lr" else curve)))
    if by_layer:
        steps.insert(1 if decay == "schedule" else len(steps), by_layer)
    return optax.chain(*steps) if len(steps) > 1 else steps[0]


def _check_options(name: str, factory: Callable, options: Mapping[str, Any]) -> None:
    known = set(inspect.signature(factory).parameters) - {"learning_rate"}
    known |= set(inspect.signature(_build).parameters) - {"tree", "make_schedule", "window", "steps", "options"}
    for key in options.keys() - known | options.keys() & {"learning_rate"}:
        hint = near(key, known, f"known keys: {', '.join(sorted(known))}")
        raise UserError(f"{WHERE} ({name}) has no key `{key}`; {hint}")


def _held(tx: optax.GradientTransformation, key: Hashable) -> optax.GradientTransformationExtraArgs:
    """Returns tx, which keeps its moments and moves nothing where `active[key]` is False; its schedules go on."""
    is_clock = lambda state: getattr(state, "_fields", None) == ("count",)  # the states of schedules in optax

    def update(updates, state, params=None, *, active, **others):
        moved, after = optax.with_extra_args_support(tx).update(updates, state, params, **others)
        pick = partial(jax.tree.map, partial(jnp.where, active[key]))

        def keep(new, old):
            if isinstance(new, transforms.Ewc):  # what a stage begins with does not wait for a term
                return new._replace(squares=pick(new.squares, old.squares))
            return new if is_clock(new) else pick(new, old)

        moved = jax.tree.map(lambda u: jnp.where(active[key], u, -0.0), moved)
        is_one = lambda state: is_clock(state) or isinstance(state, transforms.Ewc)
        return moved, jax.tree.map(keep, after, state, is_leaf=is_one)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def ema_update(ema: Any, params: Any, decay: float, step: Any) -> Any:
    """Returns d ema + (1 - d) params, with d = min(decay, (1 + step) / (10 + step)).

    The smaller d of early steps lets the average follow fast. If `ema` and `params` are equal (frozen parameters), the
    result is equal bit for bit.

    Args:
      ema: running average, a tree like `params`.
      params: parameters after the update of `step` (0, 1, ...).
      decay: e.g. 0.999.
      step: scalar, may be traced.
    """
    share = jnp.maximum(1 - decay, 9 / (10 + jnp.asarray(step, jnp.float32)))  # 1 - d
    return jax.tree.map(lambda average, p: (average + share * (p - average)).astype(average.dtype), ema, params)
