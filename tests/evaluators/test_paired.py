"""McNemar's test and the paired bootstrap against enumeration and simulation."""

from math import comb

import numpy as np
import pytest

from vlm_jax.evaluators.metrics import paired


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (5, 1), (1, 5), (3, 3), (8, 0)])
def test_p_by_enumeration(gained, lost):
    first = np.array([False] * gained + [True] * lost + [True, False])
    second = np.array([True] * gained + [False] * lost + [True, False])
    n = gained + lost
    ways = [comb(n, i) for i in range(n + 1)]
    slow = sum(way for way in ways if way <= ways[gained]) / 2**n
    found = paired(first, second)
    assert (found.gained, found.lost) == (gained, lost) and found.p == pytest.approx(slow)
    assert found.difference == (gained - lost) / (n + 2)


def test_the_interval_covers_at_its_rate():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(300):
        first = rng.random(400) < 0.5
        low, high = paired(first, first ^ (rng.random(400) < 0.2)).interval  # the true difference is 0
        covered += low <= 0 <= high
    assert 0.92 <= covered / 300 <= 0.98
