"""Learning-rate schedules as multipliers in [0, 1], and durations in steps, epochs, examples or percent."""

import contextlib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from vlm_jax import config
from vlm_jax.errors import UserError

Schedule = Callable[[Any], Any]

_MAGNITUDE = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}
_DURATION = re.compile(
    r"\s*([0-9][0-9_]*(?:\.[0-9]*)?(?:e\+?[0-9]+)?)\s*([kmb]?)\s*(%|steps?|epochs?|examples?|)\s*", re.I
)


def duration_to_steps(
    duration: int | str,
    batch_size: int | None = None,
    examples_per_epoch: int | None = None,
    total_steps: int | None = None,
) -> int:
    """Returns a duration as a number of optimizer steps, rounded; at least 1 for durations above 0.

    Args:
      duration: 1000, "1000" or "1000 steps", "10 epochs", "50000 examples" or "1M examples" (k, M, B), "10%" of all
        steps.
      batch_size: global batch size; needed for epochs and examples.
      examples_per_epoch: needed for epochs.
      total_steps: needed for percent.

    Raises:
      UserError: the duration cannot be read, or needs one of these numbers and the number is None.
    """
    if isinstance(duration, int) and not isinstance(duration, bool) and duration >= 0:
        return duration
    match = _DURATION.fullmatch(duration) if isinstance(duration, str) else None
    if match is None or not math.isfinite(float(match[1].replace("_", ""))):
        raise UserError(
            f"a duration is {duration!r:.80}; expected a number of steps, '1000 steps', '10 epochs', '1M examples' "
            "or '10%'"
        )
    number = float(match[1].replace("_", "")) * _MAGNITUDE[match[2].lower()]
    unit = match[3].lower().rstrip("s") or "step"

    def known(value, name):
        if not value:
            raise UserError(f"a duration is {duration!r}, but the {name} is not known here; give it in steps")
        return value

    if unit == "%":
        steps = number / 100 * known(total_steps, "total number of steps")
    elif unit == "epoch":
        steps = number * known(examples_per_epoch, "number of examples") / known(batch_size, "batch size")
    elif unit == "example":
        steps = number / known(batch_size, "batch size")
    else:
        steps = number
    return max(1, round(steps)) if number else 0


def _ramps(total_steps: int, warmup: int, cooldown: int, shape: Callable) -> Schedule:
    """Returns step -> shape(step - warmup, total_steps - warmup), times both ramps; 0 <= multiplier <= 1."""
    if warmup + cooldown > total_steps:
        raise UserError(f"warm-up ({warmup}) and cool-down ({cooldown}) exceed the run's {total_steps} steps")

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        value = shape(step - warmup, max(1, total_steps - warmup))
        if warmup:
            value *= jnp.minimum(1, step / warmup)
        if cooldown:
            value *= jnp.clip((total_steps - step) / cooldown, 0, 1)
        return value

    return schedule


def cosine(total_steps: int, *, warmup: int = 0, cooldown: int = 0, end: float = 0.0) -> Schedule:
    """Returns half a cosine from 1 at the end of the warm-up to `end` at `total_steps`."""
    shape = lambda t, n: end + (1 - end) * 0.5 * (1 + jnp.cos(math.pi * jnp.clip(t / n, 0, 1)))
    return _ramps(total_steps, warmup, cooldown, shape)


def linear(total_steps: int, *, warmup: int = 0, cooldown: int = 0, end: float = 0.0) -> Schedule:
    """Returns a line from 1 at the end of the warm-up to `end` at `total_steps`."""
    return _ramps(total_steps, warmup, cooldown, lambda t, n: end + (1 - end) * (1 - jnp.clip(t / n, 0, 1)))


def constant(total_steps: int, *, warmup: int = 0, cooldown: int = 0) -> Schedule:
    """Returns 1 between warm-up and cool-down."""
    return _ramps(total_steps, warmup, cooldown, lambda t, n: jnp.ones_like(t))


def rsqrt(total_steps: int, *, warmup: int = 0, cooldown: int = 0, timescale: int = 10_000, shift: int = 0) -> Schedule:
    """1 / sqrt(1 + (step - warmup + shift) / timescale), Zhai et al. 2022 (arXiv:2106.04560, Section 3.5)."""
    shape = lambda t, n: 1 / jnp.sqrt(1 + (jnp.maximum(t, 0) + shift) / timescale)
    return _ramps(total_steps, warmup, cooldown, shape)


SCHEDULES = {"cosine": cosine, "linear": linear, "constant": constant, "rsqrt": rsqrt}
_DURATIONS = ("warmup", "cooldown", "timescale", "shift")


def build(
    section: Mapping[str, Any],
    total_steps: int,
    steps: Callable[[int | str], int] | None = None,
    where: str = "schedule",
) -> Schedule:
    """Returns `schedule(step) -> multiplier`; step 0 is the first.

    Args:
      section: `dict(name=..., **options)`: the name of a function above and the function's arguments. `warmup` (from
        0), `cooldown` (to 0 at `total_steps`), `timescale` and `shift` are durations, see `duration_to_steps`. With
        `cycles`, the curve of total_steps / cycles steps begins anew so often, such as with each of as many stages.
      total_steps: number of optimizer steps of the run.
      steps: duration -> number of steps; None allows only durations in steps or percent.
      where: name of the section in messages.

    Raises:
      UserError: unknown name or option, unreadable duration, or warm-up and cool-down longer than the run.
    """
    options = dict(section)
    schedule = config.choose(SCHEDULES, options.pop("name", "cosine"), f"{where}.name")
    cycles = options.pop("cycles", 1)
    if type(cycles) is not int or cycles < 1:
        raise UserError(f"{where}.cycles is {cycles!r}; expected a whole number, 1 or more")
    steps = steps or (lambda duration: duration_to_steps(duration, total_steps=total_steps))
    for key in [key for key in _DURATIONS if key in options]:
        with _named(f"{where}.{key}"):
            options[key] = steps(options[key])
    with _named(where):
        curve = config.call(schedule, options, where, total_steps=max(1, round(total_steps / cycles)))
    if cycles == 1:
        return curve
    begins = jnp.asarray([round(total_steps * cycle / cycles) for cycle in range(cycles)])
    return lambda step: curve(step - begins[jnp.sum(begins <= step) - 1])


def window(weight: float | Mapping[str, Any], steps: Callable[[int | str], int] | None, where: str) -> float | Schedule:
    """Returns a weight: the number itself, or a function of the step that is 0 outside a window.

    Args:
      weight: a number, or a dict:
        value: factor on the schedule (1.0).
        begin, end: durations from the run's start; the weight is 0 before `begin` and from `end` on.
        Others: the schedule over the window, see `build`; constant by default.
      steps: duration -> number of steps of the run.
      where: name of the weight in messages.

    Raises:
      UserError: the weight is 0 at every step, or as for `build`.
    """
    if not isinstance(weight, Mapping):
        if not weight:
            raise UserError(f"{where} is {weight} at every step; leave the term out, or give it a weight")
        return weight
    options = {"name": "constant", **weight}
    value, first, last = options.pop("value", 1.0), options.pop("begin", 0), options.pop("end", "100%")
    if steps is None:
        raise UserError(f"{where} changes over the run, but the number of steps is not known here; give a number")
    with _named(where):
        first, last = steps(first), steps(last)
    if first >= last or not value:
        raise UserError(f"{where}: {value} from step {first} to step {last} is 0 at every step of the run")
    curve = build(options, last - first, steps, where)
    inside = lambda step: (step >= first) & (step < last)
    return lambda step: jnp.where(inside(step), value * curve(step - first), 0.0)


@contextlib.contextmanager
def _named(where: str):
    """Puts the section's name before messages that lack the name."""
    try:
        yield
    except UserError as error:
        raise error if str(error).startswith(where) else UserError(f"{where}: {error}") from None
