"""Pure functions from scores to numbers. N examples or queries, C classes, M candidates."""

from collections.abc import Sequence

import numpy as np

ROWS_AT_A_TIME = 1024  # bounds the memory of comparisons over [N, M]


def truth_ranks(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Returns how many candidates stand before the true one, int [N]: 0 is right.

    Equal scores stand in the order of their index, as in a stable sort. A true candidate whose score is NaN stands
    last (rank M): a model that has diverged gets nothing right.

    Args:
      scores: float [N, M], higher is better.
      truth: int [N], index of the true candidate.
    """
    _check(scores.ndim == 2 and truth.shape == scores.shape[:1], "scores [N, M] and truth [N]", scores, truth)
    ranks = np.empty(len(scores), np.int64)
    for rows in _chunks(len(scores)):
        own = np.take_along_axis(scores[rows], truth[rows, None], axis=1)
        earlier = np.arange(scores.shape[1]) < truth[rows, None]
        before = (scores[rows] > own) | ((scores[rows] == own) & earlier)
        ranks[rows] = np.where(np.isnan(own[:, 0]), scores.shape[1], before.sum(axis=1))
    return ranks


def top_k_accuracy(logits: np.ndarray, labels: np.ndarray, mask: np.ndarray | None = None, k: int = 1) -> float:
    """Returns the share of examples whose label is among the `k` highest logits.

    Args:
      logits: float [N, C].
      labels: int [N]; those of masked examples may be anything.
      mask: bool [N], which examples count; all by default.
      k: how many classes may be named.
    """
    mask = np.ones(len(labels), bool) if mask is None else np.asarray(mask, bool)
    _check(mask.any(), "at least one example that counts", logits, mask)
    return float(np.mean(truth_ranks(logits[mask], labels[mask]) < k))


def mean_per_class_accuracy(
    correct: np.ndarray, labels: np.ndarray, num_classes: int, mask: np.ndarray | None = None
) -> tuple[float, np.ndarray]:
    """Returns the mean over classes of their accuracy, and the accuracies, float [C]: NaN where a class has no example.

    Args:
      correct: bool [N].
      labels: int [N].
      num_classes: C.
      mask: bool [N], which examples count; all by default.
    """
    mask = np.ones(len(labels), bool) if mask is None else np.asarray(mask, bool)
    _check(mask.any(), "at least one example that counts", labels, mask)
    counts = np.bincount(labels[mask], minlength=num_classes)
    right = np.bincount(labels[mask], weights=correct[mask], minlength=num_classes)
    per_class = np.divide(right, counts, out=np.full(num_classes, np.nan), where=counts > 0)
    return float(np.nanmean(per_class)), per_class


def confusions(
    predicted: np.ndarray, labels: np.ndarray, margins: np.ndarray | None = None
) -> list[tuple[int, int, int]]:
    """Returns the mistakes as (label, predicted, count), the most frequent first, among equals the surest.

    Args:
      predicted: int [N].
      labels: int [N].
      margins: float [N], how far the predicted class's score is above the label's.
    """
    wrong = np.flatnonzero(predicted != labels)
    pairs = np.stack([labels[wrong], predicted[wrong]], axis=1)
    pairs, index, counts = np.unique(pairs, axis=0, return_inverse=True, return_counts=True)
    margins = np.zeros(len(labels)) if margins is None else margins
    sureness = np.bincount(index.ravel(), weights=margins[wrong], minlength=len(pairs)) / np.maximum(counts, 1)
    order = np.lexsort((-sureness, -counts))
    return [(int(pairs[i, 0]), int(pairs[i, 1]), int(counts[i])) for i in order]


def retrieval_recall(
    similarity: np.ndarray, image_of_text: np.ndarray, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Returns `image_to_text/recall@k` and `text_to_image/recall@k` for images with one or several captions.

    Image to text: the share of images that have one of their captions among the k most similar texts.
    Text to image: the share of captions that have their image among the k most similar images.
    (Karpathy & Fei-Fei 2015, arXiv:1412.2306, section 4.1.)

    Args:
      similarity: float [N, M], of N images with M texts.
      image_of_text: int [M], which image a text describes.
      ks: how many candidates may be named.
    """
    images, texts = similarity.shape
    _check(image_of_text.shape == (texts,), "similarity [N, M] and image_of_text [M]", similarity, image_of_text)
    captions = np.bincount(image_of_text, minlength=images)
    _check(len(captions) == images and captions.all(), "a caption for each image", similarity, image_of_text)
    best = np.empty(images, np.int64)  # the most similar of an image's own captions
    for rows in _chunks(images):
        own = image_of_text == np.arange(images)[rows, None]
        best[rows] = np.where(own, similarity[rows], -np.inf).argmax(axis=1)
    ranks = {
        "image_to_text": truth_ranks(similarity, best),
        "text_to_image": truth_ranks(similarity.T, image_of_text),
    }
    return {f"{name}/recall@{k}": float(np.mean(rank < k)) for name, rank in ranks.items() for k in ks}


def _chunks(rows: int) -> list[slice]:
    return [slice(start, start + ROWS_AT_A_TIME) for start in range(0, rows, ROWS_AT_A_TIME)]


def _check(condition: bool, expected: str, *arrays: np.ndarray) -> None:
    if not condition:
        raise ValueError(f"expected {expected}; got shapes {', '.join(str(a.shape) for a in arrays)}")
