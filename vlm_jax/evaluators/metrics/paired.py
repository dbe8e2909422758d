"""Two models on the same examples: is the difference more than chance?"""

from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest

from vlm_jax.evaluators.metrics.intervals import RESAMPLES, percentiles
from vlm_jax.evaluators.metrics.ranking import check


class Paired(NamedTuple):
    """How a second model differs from a first.

    Attributes:
      difference: the second's share of right examples minus the first's.
      interval: its 95 % confidence interval, by the bootstrap over examples.
      gained: int, examples that only the second has right.
      lost: int, examples that only the first has right.
      p: the probability of so uneven a split of these examples, or a more uneven one, by a fair coin (McNemar 1947,
        exact and two-sided); 1 where no example differs.
    """

    difference: float
    interval: tuple[float, float]
    gained: int
    lost: int
    p: float


def paired(first: np.ndarray, second: np.ndarray, seed: int = 0) -> Paired:
    """Compares two models on the same N examples.

    Args:
      first, second: bool [N], whether each has an example right.
      seed: of the resamples.
    """
    first, second = np.asarray(first, bool), np.asarray(second, bool)
    check(first.shape == second.shape and first.ndim == 1 and len(first), "two arrays bool [N]", first, second)
    gained, lost, n = int(np.sum(second & ~first)), int(np.sum(first & ~second)), len(first)
    drawn = np.random.default_rng(seed).multinomial(n, [gained / n, lost / n, 1 - (gained + lost) / n], RESAMPLES)
    p = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    interval = percentiles((drawn[:, 0] - drawn[:, 1]) / n)
    return Paired((gained - lost) / n, interval, gained, lost, float(p))
