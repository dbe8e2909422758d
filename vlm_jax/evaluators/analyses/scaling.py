"""Scaling laws of losses: fits with intervals, the best size for a budget, and what two modalities share."""

import itertools
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares
from scipy.special import logsumexp

from vlm_jax.evaluators.metrics.intervals import percentiles
from vlm_jax.evaluators.metrics.ranking import check

DELTA = 1e-3  # of Huber's loss, on logarithms
STARTS = list(itertools.product((0.0, 5.0, 10.0), (0.0, 5.0, 10.0), (-1.0, 0.0), (0.2, 0.5, 1.0), (0.2, 0.5, 1.0)))


class Law(NamedTuple):
    """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, arXiv:2203.15556, equation 2).

    Attributes:
      E: the loss of infinite models and data.
      A, alpha: of the number of parameters N.
      B, beta: of the number of examples or tokens D.
    """

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def __call__(self, parameters: np.ndarray, examples: np.ndarray) -> np.ndarray:
        return self.E + self.A / np.power(parameters, self.alpha) + self.B / np.power(examples, self.beta)

    def best(self, budget: float, cost: float = 6.0) -> tuple[float, float]:
        """Returns N and D of the lowest loss with cost N D = budget FLOPs (equation 4)."""
        g = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        parameters = g * (budget / cost) ** (self.beta / (self.alpha + self.beta))
        return float(parameters), float(budget / cost / parameters)


def fit_law(parameters: np.ndarray, examples: np.ndarray, loss: np.ndarray, near: Law | None = None) -> Law:
    """Returns the law of the least Huber loss between logarithms, from many starts (approach 3 of the paper).

    Args:
      parameters: N, [R], of R runs.
      examples: D, [R].
      loss: final losses, [R], above 0.
      near: the only start, such as the law of other runs.
    """
    n, d, y = (np.log(np.asarray(one, np.float64)) for one in (parameters, examples, loss))
    check(n.shape == d.shape == y.shape and n.ndim == 1 and len(n) > 5, "more than five runs, arrays [R]", n, d, y)

    def residual(x):
        a, b, e, alpha, beta = x
        return logsumexp([a - alpha * n, b - beta * d, np.full_like(n, e)], axis=0) - y

    starts = STARTS if near is None else [(*np.log([near.A, near.B, near.E]), near.alpha, near.beta)]
    a, b, e, alpha, beta = _least(residual, starts)
    return Law(*map(float, (np.exp(e), np.exp(a), alpha, np.exp(b), beta)))


class Interaction(NamedTuple):
    """The loss of a model of two modalities (Aghajanyan et al. 2023, arXiv:2301.03728).

        L(N, D_i, D_j) = (L_i + L_j) / 2 - C + A / N^alpha + B / (D_i + D_j)^beta

    Attributes:
      C: the most that the modalities gain from one another, at infinite size.
      A, alpha, B, beta: how they compete for parameters and for data.
    """

    C: float
    A: float
    alpha: float
    B: float
    beta: float

    def __call__(self, parameters: np.ndarray, examples: np.ndarray) -> np.ndarray:
        """The difference from the mean of both laws: below 0 where training together helps."""
        return self.A / np.power(parameters, self.alpha) + self.B / np.power(examples, self.beta) - self.C


def fit_interaction(
    laws: tuple[Law, Law], parameters: np.ndarray, examples: tuple[np.ndarray, np.ndarray], loss: np.ndarray
) -> Interaction:
    """Returns the interaction of two modalities whose own laws are known, fitted as in `fit_law`.

    Args:
      laws: of each modality alone.
      parameters: N, [R].
      examples: D_i and D_j, [R] each.
      loss: of models of both, [R], the mean of the two modalities' losses.
    """
    n, y = np.asarray(parameters, np.float64), np.log(np.asarray(loss, np.float64))
    first, second = (np.asarray(one, np.float64) for one in examples)
    check(n.shape == first.shape == second.shape == y.shape and len(n) > 5, "more than five runs, arrays [R]", n, y)
    alone = (laws[0](n, first) + laws[1](n, second)) / 2

    def residual(x):
        a, b, c, alpha, beta = x
        together = alone + np.exp(a) / n**alpha + np.exp(b) / (first + second) ** beta - np.exp(c)
        return np.log(np.maximum(together, 1e-9)) - y

    a, b, c, alpha, beta = _least(residual, STARTS)
    return Interaction(*map(float, (np.exp(c), np.exp(a), alpha, np.exp(b), beta)))


def law_intervals(
    parameters: np.ndarray, examples: np.ndarray, loss: np.ndarray, *, resamples: int = 100, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Returns the 95 % intervals of a law's numbers over resamples of the runs; see `fit_law`."""
    rng, (n, d, y) = np.random.default_rng(seed), map(np.asarray, (parameters, examples, loss))
    near = fit_law(n, d, y)
    fits = [fit_law(n[rows], d[rows], y[rows], near) for rows in rng.integers(len(n), size=(resamples, len(n)))]
    return {name: percentiles(np.array([getattr(fit, name) for fit in fits])) for name in Law._fields}


def _least(residual, starts):
    options = dict(loss="huber", f_scale=DELTA, x_scale="jac", xtol=1e-12, ftol=1e-12)
    with np.errstate(over="ignore"):
        few = sorted(starts, key=lambda start: np.sum(np.abs(residual(np.array(start)))))[:4]
        fits = [least_squares(residual, start, **options) for start in few]
    return min(fits, key=lambda found: found.cost).x
