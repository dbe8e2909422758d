"""Metrics of continual learning, against numbers counted by hand."""

import numpy as np
import pytest

from vlm_jax.errors import UserError
from vlm_jax.evaluators.metrics import after_stages, continual

AFTER = np.array([[0.8, 0.3, 0.1, 0.5], [0.6, 0.7, 0.2, 0.4], [0.5, 0.9, 0.6, 0.3]])  # 3 stages; a set of no stage
BEFORE = np.array([0.2, 0.2, 0.1, 0.6])


def test_by_hand():
    found = continual(AFTER, BEFORE)
    wanted = {
        "average": (0.5 + 0.9 + 0.6) / 3,
        "forgetting": ((0.8 - 0.5) + (0.7 - 0.9)) / 2,
        "backward_transfer": ((0.5 - 0.8) + (0.9 - 0.7)) / 2,
        "forward_transfer": ((0.3 - 0.2) + (0.2 - 0.1)) / 2,
        "zero_shot_kept": 0.3 / 0.6,
    }
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name
    assert continual(AFTER[:, :3]).keys() == {"average", "forgetting", "backward_transfer"}


def test_one_stage_has_nothing_to_forget():
    found = continual(AFTER[:1, :1], BEFORE[:1])
    assert found["average"] == 0.8
    assert all(np.isnan(found[name]) for name in ("forgetting", "backward_transfer", "forward_transfer"))


def test_the_log_of_a_run():
    """Each evaluation has a value at the end of each stage, and at other steps."""
    names = [f"style_{i}/top1" for i in range(4)]
    series = {name: ([2, 4, 6, 8], [0.0, *column]) for name, column in zip(names, AFTER.T, strict=True)}
    np.testing.assert_array_equal(after_stages(series, names, (4, 6, 8)), AFTER)
    with pytest.raises(UserError, match="`style_1/top1` has no value at step 5; it has values at steps: 2, 4, 6, 8"):
        after_stages(series, names[1:], [5])
    with pytest.raises(UserError, match=r"`x` has no value at step 2; .* none; metrics: style_0/top1"):
        after_stages(series, ["x"], [2])


@pytest.mark.parametrize(
    ("accuracy", "before", "message"),
    [
        (AFTER[:, :2], None, r"accuracies have the shape \(3, 2\); expected \[stages, data sets\]"),
        (AFTER[0], None, r"have the shape \(4,\)"),
        (AFTER, BEFORE[:3], r"before the first stage have the shape \(3,\); expected \(4,\)"),
    ],
)
def test_shapes_are_checked(accuracy, before, message):
    with pytest.raises(UserError, match=message):
        continual(accuracy, before)
