"""Strategies that choose which pictures of a pool to label: `acquire(seen, count, rng) -> rows`, see `adapt.active`."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.special

from vlm_jax import catalogue, config
from vlm_jax.adapt import heads
from vlm_jax.adapt.active import Acquire
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError


@method(family="acquisitions", differs="any pictures: the baseline of all others")
def random() -> Acquire:
    """Pictures at random."""
    return lambda seen, count, rng: rng.permutation(len(seen.features))[:count]


@method(family="acquisitions", differs="the pictures whose predicted classes are the most uncertain")
def entropy() -> Acquire:
    """The largest entropies of the predicted probabilities; of equal ones the first."""
    return lambda seen, count, rng: _largest(_entropy(seen.logits), count)


@method(
    family="acquisitions",
    paper="arXiv:1708.00489",
    differs="pictures that are far from all labelled ones, so that every picture has a labelled one near it",
)
def coreset() -> Acquire:
    """Core-set selection (Sener and Savarese 2018), the greedy k-centre: again and again the farthest picture."""

    def acquire(seen, count, rng):
        far, chosen = _distances(seen.features, seen.labelled).min(1), []
        for _ in range(count):
            chosen.append(int(far.argmax()))
            far = np.minimum(far, _distances(seen.features, seen.features[chosen[-1:]])[:, 0])
            far[chosen] = -1
        return np.array(chosen)

    return acquire


@method(
    family="acquisitions",
    paper="arXiv:1906.03671",
    differs="gradients of the last layer that are large and different: uncertain and diverse pictures",
)
def badge() -> Acquire:
    """BADGE (Ash et al. 2020): k-means++ seeding on the last layer's gradients (p - y^) x', y^ the predicted class.

    The first picture has the largest gradient; each further one is drawn by its squared distance from the chosen ones.
    """

    def acquire(seen, count, rng):
        p = scipy.special.softmax(np.asarray(seen.logits, np.float64), axis=1)
        errors, x = p - np.eye(p.shape[1])[p.argmax(1)], np.asarray(seen.features, np.float64)
        norms = (errors**2).sum(1) * (x**2).sum(1)
        square = lambda i: norms + norms[i] - 2 * (errors @ errors[i]) * (x @ x[i])  # of outer products
        chosen = [int(norms.argmax())]
        far = np.full(len(x), np.inf)
        while len(chosen) < count:
            far = np.minimum(far, np.maximum(square(chosen[-1]), 0))
            far[chosen] = 0
            left = np.setdiff1d(np.arange(len(x)), chosen)
            shares = far[left] / far.sum() if far.sum() > 0 else None
            chosen.append(int(rng.choice(left, p=shares)))
        return np.array(chosen)

    return acquire


@method(
    family="acquisitions",
    paper="arXiv:2311.11178",
    differs="labels go to the classes that have the fewest, by the pictures' predicted classes",
)
def pcb(*, among: str | Mapping[str, Any] | None = "badge", share: float = 0.1) -> Acquire:
    """PCB (Bang et al. 2024): balances the labelled classes among the candidates of another strategy.

    Again and again a random candidate whose predicted class has the fewest labels, counted with those just chosen; a
    random candidate if none has that class.

    Args:
      among: the strategy of the candidates; None: all pictures are candidates.
      share: of the pool that are candidates, at least as many as are to be labelled.
    """
    if not 0 < share <= 1:
        raise UserError(f"share of pcb is {share}; expected above 0, to 1 (all pictures are candidates)")
    candidates = among and catalogue.build("acquisitions", among, "among of pcb")

    def acquire(seen, count, rng):
        size = len(seen.features)
        left = candidates(seen, max(count, int(share * size)), rng) if candidates else np.arange(size)
        predicted, chosen = seen.logits.argmax(1), []
        counts = np.bincount(seen.labels, minlength=seen.logits.shape[1])
        for _ in range(count):
            least = counts.argmin()
            own = left[predicted[left] == least]
            counts[least] += len(own) > 0
            chosen.append(int(rng.choice(own if len(own) else left)))
            left = left[left != chosen[-1]]
        return np.array(chosen)

    return acquire


@method(
    family="acquisitions",
    system="Epinet-active",
    paper="arXiv:2211.01568",
    differs="the pictures on which an epinet's predictions vary the most over its index",
)
def epinet(*, steps: int = 300, learning_rate: float = 1e-2, prior: float = 1.0) -> Acquire:
    """Epistemic priority (Osband et al. 2022): the largest variances of `heads.epinet`, trained on the labels so far.

    With --method=epinet the classifier is of the same kind.

    Args:
      steps, learning_rate, prior: of `heads.epinet`.
    """
    config.check_least(0, "the acquisition epinet", steps=steps, learning_rate=learning_rate, prior=prior)
    make = functools.partial(heads.epinet, steps=steps, learning_rate=learning_rate, prior=prior)

    def acquire(seen, count, rng):
        head = make(seen.labelled, seen.labels, seen.text, seen.scale, seed=int(rng.integers(2**31)))
        return _largest(head.uncertainty(seen.features), count)

    return acquire


def _largest(scores: np.ndarray, count: int) -> np.ndarray:
    return np.argsort(-scores, kind="stable")[:count]


def _entropy(logits: np.ndarray) -> np.ndarray:
    p = scipy.special.softmax(np.asarray(logits, np.float64), axis=1)
    return scipy.special.entr(p).sum(1)


def _distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Squared distances, float64 [N, M]."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
