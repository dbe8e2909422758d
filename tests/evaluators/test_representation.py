"""Measures of sets of embeddings against closed forms, scipy and slow loops."""

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.stats import ortho_group

from vlm_jax.evaluators import metrics

RNG = np.random.default_rng(0)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_gap_alignment_and_uniformity_by_loops(monkeypatch):
    monkeypatch.setattr("vlm_jax.evaluators.metrics.representation.ROWS", 7)
    x, y = unit(RNG.normal(size=(20, 4))), unit(RNG.normal(size=(20, 4)))
    assert metrics.modality_gap(x, y) == pytest.approx(np.linalg.norm(x.mean(0) - y.mean(0)), abs=1e-12)
    assert metrics.alignment(x, y) == pytest.approx(np.mean([np.sum((a - b) ** 2) for a, b in zip(x, y, strict=True)]))
    pairs = [np.exp(-2 * np.sum((x[i] - x[j]) ** 2)) for i in range(20) for j in range(i)]
    assert metrics.uniformity(x) == pytest.approx(np.log(np.mean(pairs)), abs=1e-9)
    assert metrics.uniformity(np.stack([x[0], -x[0]])) == pytest.approx(-8.0, abs=1e-9)


def test_effective_rank_of_known_spectra():
    basis = ortho_group.rvs(6, random_state=0)
    for values, rank in (([3.0, 3, 3, 3, 3, 3], 6.0), ([5.0, 0, 0, 0, 0, 0], 1.0), ([1.0, 1, 0, 0, 0, 0], 2.0)):
        assert metrics.effective_rank(basis * values) == pytest.approx(rank, abs=1e-6)


def test_cka_and_neighbours_are_blind_to_rotation_and_scale(monkeypatch):
    monkeypatch.setattr("vlm_jax.evaluators.metrics.ranking.ROWS", 7)
    x, y = RNG.normal(size=(30, 5)), RNG.normal(size=(30, 4))
    turned = 3 * x @ ortho_group.rvs(5, random_state=1)
    assert metrics.cka(x, turned) == pytest.approx(1, abs=1e-9)
    assert metrics.neighbour_overlap(x, turned, k=4) == 1
    a, b = x - x.mean(0), y - y.mean(0)
    centred = [one @ one.T for one in (a, b)]  # by the kernels
    slow = np.sum(centred[0] * centred[1]) / np.sqrt(np.prod([np.sum(k * k) for k in centred]))
    assert metrics.cka(x, y) == pytest.approx(slow, abs=1e-9)
    near = [[set(np.argsort([-u @ v if i != j else np.inf for j, v in enumerate(s)])[:4]) for i, u in enumerate(s)]
            for s in (unit(x), unit(y))]  # fmt: skip
    shares = [len(one & other) / 4 for one, other in zip(*near, strict=True)]
    assert metrics.neighbour_overlap(x, y, k=4) == pytest.approx(np.mean(shares), abs=1e-12)


def test_frechet_distance():
    x, y = RNG.normal(size=(50, 4)), RNG.normal(1, 2, size=(60, 4))
    covariances = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = np.trace(sqrtm(covariances[0] @ covariances[1]).real)
    slow = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * root
    assert metrics.frechet(x, y) == pytest.approx(slow, rel=1e-6)
    assert metrics.frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet(x, x + 2) == pytest.approx(4 * 4, abs=1e-9)


def test_the_integration_rate_sums_over_layers_and_knows_no_scale():
    texts, pictures = RNG.normal(size=(80, 4)), RNG.normal(0.5, 1, size=(70, 4))
    rate, layers = metrics.integration_rate([(pictures, texts), (pictures + 1, texts)])
    assert rate == pytest.approx(np.log10(layers.sum()), abs=1e-12) and layers[1] > layers[0]
    assert metrics.integration_rate([(9 * pictures, 9 * texts)])[0] == pytest.approx(np.log10(layers[0]), abs=1e-9)
    far = np.concatenate([pictures, [[1e3, 0, 0, 0]]])  # one token of a huge norm becomes the median
    median = np.concatenate([pictures, [np.median(far, axis=0)]])
    assert metrics.integration_rate([(far, texts)])[0] == pytest.approx(
        metrics.integration_rate([(median, texts)])[0], abs=1e-9
    )
