"""Planted laws are recovered, and a larger run foretold."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from vlm_jax.evaluators.analyses.scaling import Interaction, Law, fit_interaction, fit_law, law_intervals

LAW = Law(1.7, 400.0, 0.34, 410.0, 0.28)
OTHER = Law(2.2, 90.0, 0.25, 700.0, 0.3)
N, D = (x.ravel() for x in np.meshgrid(np.geomspace(1e6, 1e9, 5), np.geomspace(1e7, 1e10, 5)))


def test_a_planted_law_is_recovered_and_foretells():
    found = fit_law(N, D, LAW(N, D))
    np.testing.assert_allclose(found, LAW, rtol=1e-4)
    assert found(1e10, 1e11) == pytest.approx(LAW(1e10, 1e11), rel=1e-6)


def test_the_best_size_is_where_the_loss_is_least():
    budget = 1e20
    loss = lambda log_n: LAW(np.exp(log_n), budget / 6 / np.exp(log_n))
    slow = minimize_scalar(loss, bounds=(np.log(1e5), np.log(1e13)), method="bounded", options=dict(xatol=1e-10))
    parameters, examples = LAW.best(budget)
    assert parameters == pytest.approx(np.exp(slow.x), rel=1e-4) and 6 * parameters * examples == pytest.approx(budget)


def test_a_planted_interaction_is_recovered():
    planted = Interaction(0.3, 60.0, 0.3, 80.0, 0.25)
    loss = (LAW(N, D) + OTHER(N, D)) / 2 + planted(N, 2 * D)
    found = fit_interaction((LAW, OTHER), N, (D, D), loss)
    np.testing.assert_allclose(found(N, 2 * D), planted(N, 2 * D), atol=1e-4)
    assert pytest.approx(planted.C, rel=1e-2) == found.C
    big = np.array([1e10]), np.array([2e11])
    assert np.sign(found(*big)) == np.sign(planted(*big)) == -1, "large enough models gain"


def test_intervals_narrow_with_the_noise():
    noise, width = np.random.default_rng(0).normal(0, 0.003, len(N)), {}
    for factor in (1, 0.1):
        found = law_intervals(N, D, LAW(N, D) * np.exp(factor * noise), resamples=20)
        width[factor] = found["alpha"][1] - found["alpha"][0]
        assert abs(np.mean(found["E"]) - LAW.E) < 0.1 * factor
    assert 0 < width[0.1] < 0.3 * width[1]
