"""How sure a model is: calibration, its cure by a temperature, and pictures that belong to no class."""

from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logsumexp, softmax
from scipy.stats import rankdata

from vlm_jax.evaluators.metrics.ranking import check

BELONGING = ("msp", "energy", "max_logit", "mcm")
"""The scores of `belonging`."""


class Bins(NamedTuple):
    """Examples by their confidence.

    Attributes:
      edges: [bins + 1], from 0 to 1.
      counts: int [bins], examples in (edges[i], edges[i + 1]].
      accuracy: [bins], the share of right examples in a bin; NaN for an empty bin.
      confidence: [bins], the mean confidence in a bin; NaN for an empty bin.
      error: the expected calibration error, sum_i counts[i] / n |accuracy[i] - confidence[i]|.
    """

    edges: np.ndarray
    counts: np.ndarray
    accuracy: np.ndarray
    confidence: np.ndarray
    error: float


def calibration_bins(confidence: Any, correct: Any, bins: int = 15) -> Bins:
    """Returns the expected calibration error (Guo et al. 2017, arXiv:1706.04599, equation 3) and its bins.

    Args:
      confidence: float [n] in [0, 1], the probability of the predicted class.
      correct: bool [n], whether the predicted class is right.
      bins: number of bins, of equal width.
    """
    confidence, correct = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    check(confidence.shape == correct.shape and confidence.ndim == 1 and confidence.size,
          "confidence [n] and correct [n]", confidence, correct)  # fmt: skip
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(index, minlength=bins)
    mean = lambda values: np.divide(
        np.bincount(index, values, bins), counts, out=np.full(bins, np.nan), where=counts > 0
    )
    right, sure = mean(correct), mean(confidence)
    error = np.nansum(counts * np.abs(right - sure)) / len(confidence)
    return Bins(np.linspace(0, 1, bins + 1), counts, right, sure, float(error))


def temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the T > 0 that minimises the mean of -log softmax(logits / T)[label] (Guo et al. 2017, section 4.2).

    T lies between 1e-3 and 1e3: where all labels have the highest logit, the best T would be 0.

    Args:
      logits: float [N, C].
      labels: int [N].
    """
    check(logits.ndim == 2 and labels.shape == logits.shape[:1], "logits [N, C] and labels [N]", logits, labels)
    exact = np.asarray(logits, np.float64)
    loss = lambda log_t: negative_log_likelihood(exact / np.exp(log_t), labels)
    found = minimize_scalar(loss, bounds=(np.log(1e-3), np.log(1e3)), method="bounded", options=dict(xatol=1e-8))
    return float(np.exp(found.x))


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean of -log softmax(logits)[label] over N examples, in nats; logits [N, C], labels int [N]."""
    return float(-np.mean(np.take_along_axis(log_softmax(logits, axis=1), labels[:, None], axis=1)))


def brier(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean of sum_c (softmax(logits)_c - [c = label])^2 (Brier 1950); logits [N, C], labels int [N]."""
    p = softmax(np.asarray(logits, np.float64), axis=1)
    p[np.arange(len(labels)), labels] -= 1
    return float(np.mean(np.sum(p**2, axis=1)))


def belonging(similarity: np.ndarray, scale: float) -> dict[str, np.ndarray]:
    """Returns scores, float64 [N] each, that are high for pictures of one of the classes.

      msp         max_c softmax(scale s)_c, the probability of the best class (arXiv:1610.02136)
      energy      log sum_c exp(scale s_c), minus the free energy (arXiv:2010.03759)
      max_logit   max_c s_c (arXiv:1911.11132)
      mcm         max_c softmax(s)_c, of cosines without the model's scale (arXiv:2211.13445)

    Args:
      similarity: s, cosines of N pictures and C classes, [N, C].
      scale: the inverse temperature of training.
    """
    s = np.asarray(similarity, np.float64)
    best = s.max(axis=1)
    total = logsumexp(scale * s, axis=1)
    return {
        "msp": np.exp(scale * best - total),
        "energy": total,
        "max_logit": best,
        "mcm": np.exp(best - logsumexp(s, axis=1)),
    }


def mahalanobis(features: np.ndarray, known: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns minus the squared distance from the nearest class, -min_c (x - m_c)' S^-1 (x - m_c), float64 [N].

    m_c are means of the classes, S is the covariance that they share (Lee et al. 2018, arXiv:1807.03888),
    with 1e-6 of its mean variance added to the diagonal.

    Args:
      features: x, float [N, D].
      known: float [K, D], of pictures of the classes.
      labels: int [K], their classes.
    """
    x, known = np.asarray(features, np.float64), np.asarray(known, np.float64)
    means = np.stack([known[labels == c].mean(axis=0) for c in np.unique(labels)])
    apart = known - means[np.unique(labels, return_inverse=True)[1]]
    covariance = apart.T @ apart / len(known)
    covariance += 1e-6 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    whiten = np.linalg.inv(np.linalg.cholesky(covariance)).T
    x, means = x @ whiten, means @ whiten
    squared = (x**2).sum(axis=1)[:, None] - 2 * x @ means.T + (means**2).sum(axis=1)
    return -squared.min(axis=1)


class Detection(NamedTuple):
    """How well a score tells pictures of the classes from others.

    Attributes:
      auroc: the probability that a picture of the classes has the higher score; equal scores count half.
      fpr95: the share of the others that pass the threshold that 95 % of the pictures of the classes pass.
    """

    auroc: float
    fpr95: float


def detection(known: np.ndarray, other: np.ndarray) -> Detection:
    """Returns how well scores [N] of pictures of the classes stand above the scores [M] of others."""
    known, other = np.asarray(known, np.float64), np.asarray(other, np.float64)
    check(known.ndim == other.ndim == 1 and len(known) and len(other), "scores [N] and scores [M]", known, other)
    n, m = len(known), len(other)
    ranks = rankdata(np.concatenate([known, other]))[:n]
    threshold = np.sort(known)[int(np.floor(0.05 * n))]  # 95 % or more are not below it
    return Detection(float((ranks.sum() - n * (n + 1) / 2) / (n * m)), float(np.mean(other >= threshold)))
