"""The optimizer: one gradient transformation from a parameter table, schedules and any optax transform."""

import difflib
import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vlm_jax import config
from vlm_jax.errors import UserError
from vlm_jax.params import schedules
from vlm_jax.params.table import map_with_name, match_rules, named_leaves

WHERE = "config.optimizer"
FROZEN, UNREACHED = "frozen", "frozen: no term reaches it"
CLOCKS = tuple(type(tx(lambda step: 0.0).init({})) for tx in (optax.scale_by_schedule, optax.add_decayed_weights))
"""The states of schedules, which count steps."""
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
        lr: multiplier of the learning rate (1.0).
        wd: multiplier of the weight decay; defaults to 1.0 for parameters named `kernel` and to 0.0 for all others.
        freeze: True keeps the parameter bit for bit, without optimizer state.
        schedule: overrides the section's schedule for this group.
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
    return config.call(_build, section, WHERE, tree=params, make_schedule=make_schedule, reach=reach)


def _build(
    name: str,
    lr: float,
    *,
    tree: Any,
    reach: Mapping[str, Hashable] | None,
    make_schedule: Callable[[Mapping[str, Any], str], schedules.Schedule],
    schedule: Mapping[str, Any] | None = None,
    weight_decay: float = 0.0,
    decay: str | None = None,
    clip_norm: float | None = None,
    params: Sequence[tuple[str, Mapping[str, Any]]] = ((".*", {}),),
    **options,
):
    factory = _factory(name)
    _check_options(name, factory, options)
    decay = decay or ("schedule" if name == "adafactor" else "lr")
    config.choose({"lr": None, "schedule": None}, decay, f"{WHERE}.decay")
    main_schedule = make_schedule(schedule or {}, f"{WHERE}.schedule")

    rules = [(regex, config.call(_group, group, f"{WHERE}.params[{regex!r}]", regex=regex)) for regex, group in params]
    groups = match_rules(rules, named_leaves(tree), where=f"{WHERE}.params")
    for leaf, group in groups.items():
        if group["wd"] is None:
            groups[leaf] = group | {"wd": float(leaf.split("/")[-1] == "kernel")}
    if all(group["freeze"] for group in groups.values()):
        raise UserError(f"{WHERE}.params freezes every parameter; nothing is left to train")

    reach = dict.fromkeys(groups) if reach is None else reach
    label_of = {}  # parameter -> label in the optimizer state
    labels: dict[tuple, str] = {}  # (description of the group, key of `active`) -> label
    transforms = {FROZEN: hold()}
    for leaf, group in groups.items():
        if group["freeze"] or leaf not in reach:
            label_of[leaf] = FROZEN
            continue
        known = (describe(group), reach[leaf])
        label = label_of[leaf] = labels.setdefault(known, f"group{len(labels)}")
        if label in transforms:
            continue
        where = f"{WHERE}.params[{group['regex']!r}].schedule"
        curve = make_schedule(group["schedule"], where) if group["schedule"] else main_schedule
        wd = weight_decay * group["wd"]
        transform = _transform(factory, options, _times(lr * group["lr"], curve), curve, wd, decay)
        transforms[label] = transform if reach[leaf] is None else _held(transform, reach[leaf])

    label_tree = map_with_name(lambda leaf, _: label_of[leaf], tree)
    trained = jax.tree.map(lambda label: label != FROZEN, label_tree)
    clip = [optax.masked(optax.clip_by_global_norm(clip_norm), trained)] if clip_norm else []
    tx = optax.chain(*clip, optax.partition(transforms, label_tree))
    words = lambda leaf, group: describe(group) if group["freeze"] or leaf in reach else UNREACHED
    return tx, {leaf: words(leaf, group) for leaf, group in groups.items()}, _times(lr, main_schedule)


def _group(*, regex: str, lr: float = 1.0, wd: float | None = None, freeze: bool = False, schedule=None) -> dict:
    """The options of one rule of the table."""
    if lr <= 0:
        raise UserError(f"{WHERE}.params[{regex!r}].lr is {lr}; expected a multiplier above 0, or use freeze=True")
    return {"regex": regex, "lr": lr, "wd": wd, "freeze": freeze, "schedule": dict(schedule) if schedule else None}


def describe(group: Mapping[str, Any]) -> str:
    """Returns the optimizer's treatment of a group in words; options with equal words form one group."""
    if group["freeze"]:
        return FROZEN
    own = group["schedule"]
    curve = ", " + " ".join(f"{k}={v}" for k, v in own.items()) if own else ""
    return f"lr x{group['lr']:.12g}, wd x{group['wd']:.12g}{curve}"


def _times(factor: float, curve: schedules.Schedule) -> schedules.Schedule:
    return lambda step: factor * curve(step)


def _transform(factory, options, lr, curve, weight_decay, decay) -> optax.GradientTransformation:
    """One group's transform: the optax function with its learning rate, and the decoupled weight decay."""
    fixed: dict[str, Any] = {"learning_rate": lr}
    builtin_decay = "weight_decay" in inspect.signature(factory).parameters
    if builtin_decay:
        fixed["weight_decay"] = weight_decay if decay == "lr" else 0.0
    tx = factory(**options, **fixed)
    if not weight_decay or (builtin_decay and decay == "lr"):
        return tx
    return optax.chain(tx, optax.add_decayed_weights(_times(-weight_decay, lr if decay == "lr" else curve)))


def _factory(name: str) -> Callable[..., optax.GradientTransformation]:
    own = {"adafactor": adafactor, "muon": muon}
    if name in own:
        return own[name]
    if _takes_learning_rate(getattr(optax, name, None)):
        return getattr(optax, name)
    known = [*own, *(n for n in dir(optax) if _takes_learning_rate(getattr(optax, n)))]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean `{close[0]}`?" if close else f"expected one of: {', '.join(known)}"
    raise UserError(f"{WHERE}.name is `{name}`, which is no optimizer of optax; {hint}")


def _check_options(name: str, factory: Callable, options: Mapping[str, Any]) -> None:
    known = set(inspect.signature(factory).parameters) - {"learning_rate"}
    known |= set(inspect.signature(_build).parameters) - {"tree", "make_schedule", "options"}
    for key in options.keys() - known | options.keys() & {"learning_rate"}:
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean `{close[0]}`?" if close else f"known keys: {', '.join(sorted(known))}"
        raise UserError(f"{WHERE} ({name}) has no key `{key}`; {hint}")


def _takes_learning_rate(fn: Any) -> bool:
    return inspect.isfunction(fn) and "learning_rate" in inspect.signature(fn).parameters


def hold() -> optax.GradientTransformation:
    """Returns updates that keep parameters bit for bit: -0.0, because adding 0.0 would turn -0.0 into 0.0."""
    update = lambda updates, state, params=None: (jax.tree.map(lambda u: jnp.full_like(u, -0.0), updates), state)
    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _held(tx: optax.GradientTransformation, key: Hashable) -> optax.GradientTransformationExtraArgs:
    """Returns tx, which keeps its moments and moves nothing where `active[key]` is False; its schedules go on."""
    is_clock = lambda state: isinstance(state, CLOCKS)

    def update(updates, state, params=None, *, active, **others):
        moved, after = optax.with_extra_args_support(tx).update(updates, state, params, **others)
        keep = lambda new, old: new if is_clock(new) else jax.tree.map(partial(jnp.where, active[key]), new, old)
        moved = jax.tree.map(lambda u: jnp.where(active[key], u, -0.0), moved)
        return moved, jax.tree.map(keep, after, state, is_leaf=is_clock)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def adafactor(
    learning_rate: optax.ScalarOrSchedule,
    *,
    min_dim_size_to_factor: int = 32,
    decay_rate: float = 0.8,
    decay_offset: int = 0,
    beta2_cap: float = 0.999,
    clipping_threshold: float | None = None,
    momentum: float | None = 0.9,
    mu_dtype: str = "bfloat16",
    eps: float = 1e-30,
) -> optax.GradientTransformation:
    """The Adafactor of Zhai et al. 2022 (arXiv:2106.04560, Section 3.4), used by LiT, SigLIP and CapPa.

    The second moment is factored for parameters with two sides of at least `min_dim_size_to_factor`. The decay of the
    second moment is min(beta2_cap, 1 - t^-decay_rate). `clipping_threshold` clips updates per parameter, in rms; None
    clips nothing. Momentum has no bias correction and is kept in `mu_dtype`. Parameter norms do not scale updates.
    """
    decay = lambda step, exponent: jnp.minimum(beta2_cap, 1 - (jnp.asarray(step, jnp.float32) + 1) ** -exponent)
    return optax.chain(
        optax.scale_by_factored_rms(
            decay_rate=decay_rate,
            step_offset=decay_offset,
            min_dim_size_to_factor=min_dim_size_to_factor,
            epsilon=eps,
            decay_rate_fn=decay,
        ),
        optax.clip_by_block_rms(clipping_threshold) if clipping_threshold else optax.identity(),
        optax.ema(momentum, debias=False, accumulator_dtype=mu_dtype) if momentum else optax.identity(),
        optax.scale_by_learning_rate(learning_rate),
    )


def muon(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float = 0.0,
    *,
    matrices: str = "kernel",
    b1: float = 0.9,
    b2: float = 0.95,
    beta: float = 0.95,
    eps: float = 1e-8,
    ns_steps: int = 5,
    consistent_rms: float | None = 0.2,
    mu_dtype: str | None = None,
) -> optax.GradientTransformation:
    """Muon (Jordan 2024) for kernels, AdamW (`b1`, `b2`) for embeddings, positions, norms, biases and scales.

    A kernel is a parameter called `matrices` with two or more axes. The last two axes are a matrix; matrices along the
    leading axes (scanned layers) are orthogonalised one by one. With `consistent_rms=0.2` updates have AdamW's size, so
    that one learning rate serves both (Liu et al. 2025, arXiv:2502.16982, Section 2.2).
    """
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    dimensions = lambda name, x: matrix if name.split("/")[-1] == matrices and x.ndim >= 2 else None
    return optax.contrib.muon(
        learning_rate,
        weight_decay=weight_decay,
        adam_weight_decay=weight_decay,
        adam_b1=b1,
        adam_b2=b2,
        beta=beta,
        eps=eps,
        ns_steps=ns_steps,
        consistent_rms=consistent_rms,
        mu_dtype=mu_dtype,
        muon_weight_dimension_numbers=lambda tree: map_with_name(dimensions, tree),
    )


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
