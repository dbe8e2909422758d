"""What every strategy that chooses what to label has to do: a strategy enters by being declared."""

import inspect

import numpy as np
import pytest

from tests.support.few_shot import unit_rows
from vlm_jax import catalogue
from vlm_jax.adapt.active import Seen

STRATEGIES = catalogue.of("acquisitions")


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategy(name):
    """Different rows, as many as asked for, to the last one; the same again; arrays are not written to."""
    acquire = STRATEGIES[name].load()()
    assert list(inspect.signature(acquire).parameters) == ["seen", "count", "rng"]
    features, text = unit_rows(0, 9, 4), unit_rows(1, 3, 4)
    seen = Seen(features, 5 * features @ text.T, unit_rows(2, 4, 4), np.array([0, 1, 1, 2]), text, 5.0)
    for array in seen[:5]:
        array.flags.writeable = False
    for count in (1, 4, 9):
        first, again = (np.asarray(acquire(seen, count, np.random.default_rng(7))) for _ in range(2))
        np.testing.assert_array_equal(first, again)
        assert len(set(first.tolist())) == count and set(first.tolist()) <= set(range(9))
