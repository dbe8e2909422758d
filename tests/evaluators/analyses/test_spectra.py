"""Planted directions are found, and nothing else."""

import numpy as np
import pytest
from scipy.stats import ortho_group

from vlm_jax.errors import UserError
from vlm_jax.evaluators.analyses.spectra import changes

RNG = np.random.default_rng(0)


def matrix(outputs=12):
    """A matrix whose singular vectors leave the last three directions of the outputs free."""
    out = ortho_group.rvs(outputs, random_state=1)
    return (ortho_group.rvs(16, random_state=0)[:, : outputs - 3] * np.linspace(9, 1, outputs - 3)) @ out[:-3], out


def test_a_planted_direction_is_an_intruder():
    base, out = matrix()
    planted = base + 20 * np.outer(RNG.normal(size=16), out[-1])
    found = changes({"a": {"kernel": base}}, {"a": {"kernel": planted}}, k=5)["a/kernel"]
    assert found.intruders == 1 and found.cosines[0] < 0.3, "in a direction that the base's rows do not span"
    assert found.rank == pytest.approx(1, abs=1e-6)
    assert found.distance == pytest.approx(np.linalg.norm(planted - base) / np.linalg.norm(base), abs=1e-12)


def test_stretching_brings_no_direction():
    base, _ = matrix()
    u, s, v = np.linalg.svd(base, full_matrices=False)
    stretched = (u * s * np.linspace(1, 2, len(s))) @ v
    found = changes({"a": {"kernel": base}}, {"a": {"kernel": stretched}}, k=5)["a/kernel"]
    assert found.intruders == 0 and found.cosines.min() > 1 - 1e-6


def test_layers_of_a_stack_and_what_is_equal():
    base, _ = matrix()
    stack = np.stack([base, base, base])
    tuned = stack.copy()
    tuned[2] += RNG.normal(size=base.shape)
    found = changes({"blocks": {"kernel": stack, "bias": stack}}, {"blocks": {"kernel": tuned, "bias": stack}})
    assert list(found) == ["blocks/kernel[2]"]
    with pytest.raises(UserError, match="k is 0"):
        changes({}, {}, k=0)
