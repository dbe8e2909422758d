"""Accuracies and confusions of N examples and C classes."""

import numpy as np

from vlm_jax.evaluators.metrics.ranking import check, truth_ranks


def top_k_accuracy(logits: np.ndarray, labels: np.ndarray, mask: np.ndarray | None = None, k: int = 1) -> float:
    """Returns the share of examples whose label is among the `k` highest logits, see `Ranks.within` for equal logits.

    Args:
      logits: float [N, C].
      labels: int [N]; labels of masked examples may be anything.
      mask: bool [N], which examples count; defaults to all.
      k: number of classes that may be named.
    """
    mask = np.ones(len(labels), bool) if mask is None else np.asarray(mask, bool)
    check(mask.any(), "at least one example that counts", logits, mask)
    return float(np.mean(truth_ranks(logits[mask], labels[mask]).within(k)))


def mean_per_class_accuracy(
    correct: np.ndarray, labels: np.ndarray, num_classes: int, mask: np.ndarray | None = None
) -> tuple[float, np.ndarray]:
    """Returns the mean accuracy of the classes, and each accuracy, float [C]; NaN for a class without examples.

    Args:
      correct: bool [N], or float [N], the probability of being right where scores are equal.
      labels: int [N].
      num_classes: C.
      mask: bool [N], which examples count; defaults to all.
    """
    mask = np.ones(len(labels), bool) if mask is None else np.asarray(mask, bool)
    check(mask.any(), "at least one example that counts", labels, mask)
    counts = np.bincount(labels[mask], minlength=num_classes)
    right = np.bincount(labels[mask], weights=correct[mask], minlength=num_classes)
    per_class = np.divide(right, counts, out=np.full(num_classes, np.nan), where=counts > 0)
    return float(np.nanmean(per_class)), per_class


def confusions(
    predicted: np.ndarray, labels: np.ndarray, margins: np.ndarray | None = None
) -> list[tuple[int, int, int]]:
    """Returns the mistakes as (label, predicted, count), the most frequent first.

    Mistakes of equal count stand by mean margin, the largest first.

    Args:
      predicted: int [N].
      labels: int [N].
      margins: float [N], the predicted class's score minus the label's score.
    """
    wrong = np.flatnonzero(predicted != labels)
    pairs = np.stack([labels[wrong], predicted[wrong]], axis=1)
    pairs, index, counts = np.unique(pairs, axis=0, return_inverse=True, return_counts=True)
    margins = np.zeros(len(labels)) if margins is None else margins
    sureness = np.bincount(index.ravel(), weights=margins[wrong], minlength=len(pairs)) / np.maximum(counts, 1)
    order = np.lexsort((-sureness, -counts))
    return [(int(pairs[i, 0]), int(pairs[i, 1]), int(counts[i])) for i in order]
