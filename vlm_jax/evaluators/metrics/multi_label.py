"""Average precision: N examples, each of which may have several of C classes."""

import numpy as np

from vlm_jax.evaluators.metrics.ranking import check

WORK = 1e8  # scores looked at by all resamples together, a few seconds
FEWEST, MOST = 50, 1000  # resamples


def average_precision(scores: np.ndarray, relevant: np.ndarray) -> float:
    """Returns the mean, over the right examples, of the precision at the example's place; NaN without right examples.

    Equal scores: the expected value over their random orders (McSherry & Najork 2008, "Computing information retrieval
    performance measures efficiently in the presence of tied scores"). NaN stands last.

    Args:
      scores: float [N], higher is better.
      relevant: bool [N].
    """
    scores, relevant = np.asarray(scores, np.float64), np.asarray(relevant, bool)
    check(scores.ndim == 1 and scores.shape == relevant.shape, "scores [N] and relevant [N]", scores, relevant)
    if not relevant.any():
        return float("nan")
    _, group = np.unique(np.where(np.isnan(scores), np.inf, -scores), return_inverse=True)
    size, right = np.bincount(group), np.bincount(group, relevant)
    start, before = np.cumsum(size) - size, np.cumsum(right) - right  # examples, right ones, of better scores
    place = np.arange(len(scores))  # in a random order of the group of its score
    of = np.repeat(np.arange(len(size)), size)
    nth = place - start[of]
    expected = before[of] + 1 + nth * (right[of] - 1) / np.maximum(size[of] - 1, 1)  # if this place is right
    return float(np.sum(right[of] / size[of] * expected / (place + 1)) / right.sum())


def mean_average_precision(scores: np.ndarray, relevant: np.ndarray) -> tuple[float, np.ndarray]:
    """Returns the mean over classes of `average_precision`, and each, float [C]; NaN for a class without examples.

    Args:
      scores: float [N, C].
      relevant: bool [N, C].
    """
    check(scores.ndim == 2 and scores.shape == relevant.shape and relevant.any(),
          "scores [N, C] and relevant [N, C], one of them true", scores, relevant)  # fmt: skip
    each = np.array([average_precision(s, r) for s, r in zip(scores.T, relevant.T, strict=True)])
    return float(np.nanmean(each)), each


def resampled_map(scores: np.ndarray, relevant: np.ndarray, seed: int = 0) -> np.ndarray:
    """Returns `mean_average_precision` of resamples of the examples, float64 [R].

    R falls with the size, from 1,000 to 50. Equal scores stand in one random order. Two examples of precision 1 and two
    of precision 0 join those with a class, as in `intervals.resampled`: 24 perfect ones are no certainty.

    Args: see `mean_average_precision`; seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    shuffle = rng.permutation(len(scores))
    order = shuffle[np.argsort(-scores[shuffle], axis=0, kind="stable")]  # [N, C]
    right = np.take_along_axis(relevant, order, axis=0)
    found = np.empty(int(np.clip(WORK / scores.size, FEWEST, MOST)))
    drawn = np.zeros(len(found), bool)  # whether a resample has a right example
    for i in range(len(found)):
        times = np.bincount(rng.integers(len(scores), size=len(scores)), minlength=len(scores))[order]
        hits = times * right
        precision = np.cumsum(hits, axis=0) / np.maximum(np.cumsum(times, axis=0), 1)
        total = hits.sum(axis=0)
        found[i] = np.sum((hits * precision).sum(axis=0) / np.maximum(total, 1)) / max(np.count_nonzero(total), 1)
        drawn[i] = total.any()
    found, count = found[drawn], np.count_nonzero(relevant.any(axis=1)) + 4
    ones, _, real = rng.multinomial(count, [2 / count, 2 / count, 1 - 4 / count], len(found)).T
    return (ones + real * found) / count
