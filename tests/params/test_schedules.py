import itertools

import jax
import numpy as np
import pytest

from tests.support.paths import GOLDEN
from vlm_jax.errors import UserError
from vlm_jax.params import schedules

STORED = np.load(GOLDEN / "adafactor.npz")


@pytest.mark.parametrize(
    "duration, steps",
    [
        (0, 0), (1000, 1000), ("1000 steps", 1000), ("1 step", 1), ("10 epochs", 391), ("0.5 epochs", 20),
        ("50000 examples", 195), ("1M examples", 3906), ("1.5k examples", 6), ("2e6 examples", 7812),
        ("100 examples", 1), ("10%", 50), ("0.01%", 1), ("0%", 0), ("2_000 steps", 2000),
    ],
)  # fmt: skip
def test_durations(duration, steps):
    assert schedules.duration_to_steps(duration, 256, 10_000, 500) == steps


@pytest.mark.parametrize(
    "duration, message",
    [
        ("10 parsecs", r"a duration is '10 parsecs'; expected a number of steps, '1000 steps', '10 epochs'"),
        (0.1, "a duration is 0.1; expected"), (-5, "a duration is -5"), ("", "a duration is ''"), (True, "is True"),
        ("3 epochs", "the number of examples is not known here; give it in steps"),
        ("3 examples", "the batch size is not known"), ("10%", "the total number of steps is not known"),
    ],
)  # fmt: skip
def test_durations_that_cannot_be_read_are_named(duration, message):
    with pytest.raises(UserError, match=message):
        schedules.duration_to_steps(duration)


def values(total, **section):
    return jax.jit(jax.vmap(schedules.build(section, total)))(np.arange(total))


def test_rsqrt_is_the_published_one():
    np.testing.assert_allclose(
        values(12, name="rsqrt", warmup=3, cooldown="25%", timescale=5), STORED["schedule"], rtol=1e-6
    )


def test_cosine_and_linear():
    t = np.arange(100)
    ramp = np.minimum(1, t / 10)
    progress = np.clip((t - 10) / 90, 0, 1)
    cosine = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * progress))
    np.testing.assert_allclose(values(100, name="cosine", warmup="10%", end=0.1), ramp * cosine, atol=1e-6)
    np.testing.assert_allclose(values(100, name="linear", warmup=10), ramp * (1 - progress), atol=1e-6)


def test_constant_with_both_ramps_and_a_last_step_above_zero():
    got = values(10, name="constant", warmup=2, cooldown="5 steps")
    np.testing.assert_allclose(got, [0, 0.5, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2], atol=1e-6)


def test_cycles_begin_the_curve_anew():
    """As often as there are stages, with the stages' own rounding."""
    for total, cycles in ((20, 4), (41, 5)):
        begins = [round(total * k / cycles) for k in range(cycles)] + [total]
        one = values(round(total / cycles), name="cosine", warmup=2)
        want = np.concatenate([np.resize(np.append(one, 0), b - a) for a, b in itertools.pairwise(begins)])
        np.testing.assert_allclose(values(total, name="cosine", warmup=2, cycles=cycles), want, atol=1e-6)
    np.testing.assert_array_equal(values(20, name="linear", cycles=1), values(20, name="linear"))


def test_durations_of_a_section_are_read_by_the_caller_s_function():
    steps = lambda duration: schedules.duration_to_steps(duration, 10, 50, 100)
    schedule = schedules.build({"name": "constant", "warmup": "2 epochs"}, 100, steps)
    np.testing.assert_allclose(schedule(5), 0.5)


@pytest.mark.parametrize(
    "section, message",
    [
        ({"name": "cosin"}, "config.optimizer.schedule.name is `cosin`; expected one of: cosine"),
        ({"warmpu": 3}, "config.optimizer.schedule has no key `warmpu`; did you mean `warmup`"),
        ({"cycles": 0}, "config.optimizer.schedule.cycles is 0; expected a whole number, 1 or more"),
        ({"cycles": 2.5}, "config.optimizer.schedule.cycles is 2.5; expected a whole number, 1 or more"),
        ({"warmup": "3 ages"}, "config.optimizer.schedule.warmup: a duration is '3 ages'"),
        ({"warmup": 60, "cooldown": "50%"}, r"config.optimizer.schedule: warm-up \(60\) and cool-down \(50\) exceed"),
    ],
)
def test_mistakes_are_named(section, message):
    with pytest.raises(UserError, match=message):
        schedules.build(section, 100, where="config.optimizer.schedule")
