"""Calibration and detection against scikit-learn, closed forms and slow loops."""

import numpy as np
import pytest
from scipy.special import softmax

from vlm_jax.evaluators import metrics

RNG = np.random.default_rng(0)


def drawn(n, temperature, classes=4):
    """Logits whose softmax at a temperature are the true probabilities, and labels drawn by them."""
    logits = RNG.normal(0, 2, (n, classes))
    p = softmax(logits / temperature, axis=1)
    return logits, (RNG.random((n, 1)) > p.cumsum(axis=1)).sum(axis=1).clip(max=classes - 1)


def test_the_temperature_is_where_the_gradient_vanishes_and_near_the_true_one():
    logits, labels = drawn(20_000, 1.7)
    t = metrics.temperature(logits, labels)
    p = softmax(logits / t, axis=1)
    # d/d(1/T) of the likelihood: the mean of the label's logit minus its expectation
    own, expected = logits[np.arange(len(labels)), labels], (p * logits).sum(axis=1)
    assert abs(np.mean(own - expected)) < 1e-6
    assert t == pytest.approx(1.7, rel=0.05)
    before, after = (
        metrics.calibration_bins(softmax(x, axis=1).max(1), x.argmax(1) == labels).error for x in (logits, logits / t)
    )
    assert after < 0.02 < before


def test_likelihood_and_brier_by_loops():
    logits, labels = drawn(50, 1.0)
    p = softmax(logits, axis=1)
    nll = -np.mean([np.log(row[label]) for row, label in zip(p, labels, strict=True)])
    squares = [sum((row[c] - (c == label)) ** 2 for c in range(4)) for row, label in zip(p, labels, strict=True)]
    assert metrics.negative_log_likelihood(logits, labels) == pytest.approx(nll, abs=1e-12)
    assert metrics.brier(logits, labels) == pytest.approx(np.mean(squares), abs=1e-12)


def test_detection_counts_pairs():
    known, other = RNG.integers(0, 8, 60) / 8 + 0.2, RNG.integers(0, 8, 45) / 8  # equal scores among them
    other[:5] = known[:5]
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in known for b in other]
    found = metrics.detection(known, other)
    assert found.auroc == pytest.approx(np.mean(pairs), abs=1e-12)
    thresholds = [t for t in known if np.mean(known >= t) >= 0.95]
    assert found.fpr95 == pytest.approx(min(np.mean(other >= t) for t in thresholds), abs=1e-12)
    assert metrics.detection(np.ones(9), np.zeros(9)) == (1.0, 0.0)


def test_auroc_equals_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    known, other = RNG.normal(1, 1, 300), RNG.normal(0, 1, 200)
    truth = np.r_[np.ones(300), np.zeros(200)]
    found = metrics.detection(known, other).auroc
    assert found == pytest.approx(sklearn.roc_auc_score(truth, np.r_[known, other]), abs=1e-9)


def test_scores_of_belonging_by_loops():
    s, scale = RNG.uniform(-1, 1, (6, 3)), 10.0
    found = metrics.belonging(s, scale)
    for i, row in enumerate(s):
        assert found["msp"][i] == pytest.approx(max(np.exp(scale * row) / sum(np.exp(scale * row))), abs=1e-9)
        assert found["mcm"][i] == pytest.approx(max(np.exp(row) / sum(np.exp(row))), abs=1e-9)
        assert found["energy"][i] == pytest.approx(np.log(sum(np.exp(scale * row))), abs=1e-9)
        assert found["max_logit"][i] == max(row)


def test_mahalanobis_by_a_loop():
    known, labels, x = RNG.normal(size=(40, 3)), np.arange(40) % 4, RNG.normal(size=(5, 3))
    means = [known[labels == c].mean(axis=0) for c in range(4)]
    covariance = sum(np.outer(row - means[c], row - means[c]) for row, c in zip(known, labels, strict=True)) / 40
    covariance += 1e-6 * np.trace(covariance) / 3 * np.eye(3)
    inverse = np.linalg.inv(covariance)
    slow = [max(-(row - m) @ inverse @ (row - m) for m in means) for row in x]
    np.testing.assert_allclose(metrics.mahalanobis(x, known, labels), slow, rtol=1e-9)
