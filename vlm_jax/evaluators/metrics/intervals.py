"""Confidence intervals of shares, by the bootstrap."""

from collections.abc import Sequence

import numpy as np

LEVEL = 0.95
RESAMPLES = 2000


def interval(values: np.ndarray, **options: np.ndarray | None) -> tuple[float, float]:
    """Returns the 95 % confidence interval of a share, the percentiles of `resampled`.

    Args: see `resampled`.
    """
    return percentiles(resampled(values, **options))


def percentiles(statistic: np.ndarray) -> tuple[float, float]:
    """Returns the interval that holds 95 % of a resampled statistic [R]."""
    low, high = np.quantile(statistic, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def resampled(
    values: np.ndarray, *, weights: np.ndarray | None = None, units: np.ndarray | None = None, seed: int = 0
) -> np.ndarray:
    """Returns the share sum(weights * values) / sum(weights) of resamples of the units, float64 [2000].

    Two units that are all right and two that are all wrong join the sample, of average weight (Agresti & Coull 1998,
    doi:10.1080/00031305.1998.10480550): otherwise 24 right of 24 would give an interval of width 0. Units with equal
    content are drawn together, by one multinomial: the cost grows with the different contents, not with N.

    Args:
      values: float [N] in [0, 1].
      weights: float [N]; defaults to ones.
      units: int [N]; values of one unit, such as the captions of a picture, are drawn together. Defaults to each alone.
      seed: of the draws.
    """
    values = np.asarray(values, np.float64)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, np.float64)
    if units is None:
        right, whole = weights * values, weights
    else:
        _, unit = np.unique(units, return_inverse=True)
        right, whole = np.bincount(unit, weights * values), np.bincount(unit, weights)
    mean = whole.mean()
    right = np.concatenate([right, [mean, mean, 0.0, 0.0]])
    whole = np.concatenate([whole, [mean] * 4])
    content, count = np.unique(np.stack([right, whole], axis=1).round(9), axis=0, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(right), count / len(right), RESAMPLES)
    sums = drawn @ content
    return sums[:, 0] / sums[:, 1]


def class_weights(labels: np.ndarray) -> np.ndarray:
    """Returns the weight of each example in the mean over classes, 1 / (examples of its class), float64 [N]."""
    return 1.0 / np.bincount(labels)[labels]


def intervals(shares: dict[str, Sequence[float] | np.ndarray], **options) -> dict[str, tuple[float, float]]:
    """Returns name -> interval of several shares of the same examples."""
    return {name: interval(np.asarray(values), **options) for name, values in shares.items()}
