"""Ranks of right candidates, the best candidates, and recalls: N queries, M candidates.

Equal scores have no order: a metric is its expected value over random orders of equal scores, see `Ranks.within`.
Functions that compare all with all take scores block by block, `scores(rows, columns) -> [rows, columns]`; the full
matrix need not exist: `lambda i, t: similarity(images[i], texts[t])`, or `lambda i, t: matrix[i, t]`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

ROWS, COLUMNS = 1024, 4096  # of a block: 32 MB in float64

Scores = Callable[[slice, slice], np.ndarray]


class Ranks(NamedTuple):
    """Where the best right candidate of each of N queries stands.

    Attributes:
      above: int [N], wrong candidates with a higher score; M if the score is NaN.
      tied: int [N], wrong candidates with the same score.
      right: int [N], right candidates with this score: 1 or more, or 0 if the score is NaN.
    """

    above: np.ndarray
    tied: np.ndarray
    right: np.ndarray

    def within(self, k: int) -> np.ndarray:
        """The probability that a right candidate is among the first k, float64 [N].

        Of `tied` + `right` candidates in random order, the first m = k - `above` are all wrong with probability
        C(tied, m) / C(tied + right, m).
        """
        places = np.maximum(k - self.above, 0)
        missed = np.where((places > self.tied) & (self.right > 0), 0.0, 1.0)
        for i in np.flatnonzero((places > 0) & (places <= self.tied)):
            drawn = np.arange(places[i])
            missed[i] = np.prod((self.tied[i] - drawn) / (self.tied[i] + self.right[i] - drawn))
        return 1.0 - missed

    @property
    def ties(self) -> int:
        """The number of queries whose rank depends on the order of equal scores."""
        return int(np.count_nonzero(self.tied))


def truth_ranks(scores: np.ndarray, truth: np.ndarray) -> Ranks:
    """Returns where the true candidates stand. A true candidate with score NaN stands last: a model that has diverged
    gets nothing right.

    Args:
      scores: float [N, M], higher is better.
      truth: int [N], index of the true candidate.
    """
    check(scores.ndim == 2 and truth.shape == scores.shape[:1], "scores [N, M] and truth [N]", scores, truth)
    ranks = Ranks(*np.zeros((3, len(scores)), np.int64))
    for rows in _slices(len(scores), ROWS):
        own = np.take_along_axis(scores[rows], truth[rows, None], axis=1)
        ranks.right[rows] = ~np.isnan(own[:, 0])
        ranks.above[rows] = np.where(ranks.right[rows], (scores[rows] > own).sum(axis=1), scores.shape[1])
        ranks.tied[rows] = (scores[rows] == own).sum(axis=1) - ranks.right[rows]
    return ranks


def top_k(scores: Scores, queries: int, candidates: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the `k` best candidates of each query, int [N, k], and their scores, float [N, k], best first.

    Equal scores are ordered by index: to look at, not to count. Memory: one block.

    Args:
      scores: the scores, block by block.
      queries: N.
      candidates: M; if M < `k`, all candidates are returned.
      k: number of candidates.
    """
    found = []
    for rows in _slices(queries, ROWS):
        best = index = None
        for columns in _slices(candidates, COLUMNS):
            block = scores(rows, columns)
            at = np.broadcast_to(np.arange(columns.start, columns.stop), block.shape)
            if best is not None:  # earlier candidates stand first: their indices are lower
                block, at = np.concatenate([best, block], axis=1), np.concatenate([index, at], axis=1)
            order = np.argsort(-block, axis=1, kind="stable")[:, :k]
            best, index = (np.take_along_axis(x, order, axis=1) for x in (block, at))
        found.append((index, best))
    index, best = zip(*found, strict=True)
    return np.concatenate(index), np.concatenate(best)


def overlap(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns how much two lists of the k best have in common, float64 [N] each: (average overlap, Jaccard index).

    The average over d = 1 to k of |A_d and B_d| / d, A_d the first d of a list, counts the first ranks more (Webber et
    al. 2010, "A similarity measure for indefinite rankings", section 3.2); |A and B| / |A or B| counts all alike.

    Args:
      first, second: int [N, k], best first, without repetition, see `top_k`.
    """
    check(first.shape == second.shape and first.ndim == 2, "two lists [N, k]", first, second)
    depth = np.arange(1, first.shape[1] + 1)
    meet = np.maximum(depth[:, None], depth)  # from which depth on both lists have a candidate
    equal = first[:, :, None] == second[:, None]
    common = np.array([(equal & (meet <= d)).sum(axis=(1, 2)) for d in depth])  # [k, N]
    return (common / depth[:, None]).mean(axis=0), common[-1] / (2 * depth[-1] - common[-1])


class Pairs:
    """Which images and texts belong together: an image has one or several texts; equal texts may count as one another.

    Args:
      images: N.
      image_of_text: int [M], which image a text describes.
      text_ids: int [M], equal for texts that count as one another; None: each text belongs to its image alone.
    """

    def __init__(self, images: int, image_of_text: np.ndarray, text_ids: np.ndarray | None = None):
        captions = np.bincount(image_of_text, minlength=images)
        check(len(captions) == images and captions.all(), "a caption for each image", captions, image_of_text)
        self.images, self.image_of_text, self._ids = images, image_of_text, None
        if text_ids is not None and len(np.unique(text_ids)) < len(text_ids):
            self._ids = np.unique(text_ids, return_inverse=True)[1]
            order = np.argsort(image_of_text, kind="stable")
            nth = np.arange(len(order)) - np.repeat(np.cumsum(captions) - captions, captions)
            self._own = np.full((images, captions.max()), -1)
            self._own[image_of_text[order], nth] = self._ids[order]

    def match(self, images: np.ndarray, texts: np.ndarray) -> np.ndarray:
        """Whether images and texts, int arrays of shapes that broadcast, belong together."""
        if self._ids is None:
            return self.image_of_text[texts] == images
        ids = self._ids[texts]
        return np.any([own[images] == ids for own in self._own.T], axis=0)

    def block(self, rows: slice, columns: slice) -> np.ndarray:
        """`match` of some images with some texts, bool [rows, columns]."""
        return self.match(np.arange(rows.start, rows.stop)[:, None], np.arange(columns.start, columns.stop))


def retrieval_ranks(scores: Scores, pairs: Pairs) -> dict[str, Ranks]:
    """Returns where the right candidates stand, `image_to_text` [N] and `text_to_image` [M].

    An image with several texts has the rank of its best text. NaN as in `truth_ranks`. Each block of scores is computed
    once for both directions, blocks with pairs twice. Memory: one block and a few numbers for each row.

    Args:
      scores: the similarity of images (rows) and texts (columns), block by block.
      pairs: the right pairs.
    """
    images, texts = pairs.images, len(pairs.image_of_text)
    best = np.full(images, -np.inf), np.full(texts, -np.inf)  # the best right score of each row and column; NaN stays
    for rows, columns in _blocks(images, texts):
        if (right := pairs.block(rows, columns)).any():
            block = np.where(right, scores(rows, columns), -np.inf)
            best[0][rows] = np.maximum(best[0][rows], block.max(axis=1))
            best[1][columns] = np.maximum(best[1][columns], block.max(axis=0))
    found = [Ranks(*np.zeros((3, n), np.int64)) for n in (images, texts)]
    for rows, columns in _blocks(images, texts):
        block, right = scores(rows, columns), pairs.block(rows, columns)
        for ranks, part, own, axis in (
            (found[0], rows, best[0][rows, None], 1),
            (found[1], columns, best[1][columns], 0),
        ):
            equal = block == own
            ranks.above[part] += ((block > own) & ~right).sum(axis=axis)
            ranks.tied[part] += (equal & ~right).sum(axis=axis)
            ranks.right[part] += (equal & right).sum(axis=axis)
    for ranks, own, last in zip(found, best, (texts, images), strict=True):
        ranks.above[np.isnan(own)] = last
    return {"image_to_text": found[0], "text_to_image": found[1]}


def recall(ranks: dict[str, Ranks], ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Returns `name/recall@k`, the share of queries with a right candidate among the first k (Karpathy & Fei-Fei 2015,
    arXiv:1412.2306, section 4.1)."""
    return {f"{name}/recall@{k}": float(np.mean(rank.within(k))) for name, rank in ranks.items() for k in ks}


def retrieval_recall(
    similarity: np.ndarray,
    image_of_text: np.ndarray,
    ks: Sequence[int] = (1, 5, 10),
    text_ids: np.ndarray | None = None,
) -> dict[str, float]:
    """Returns `image_to_text/recall@k` and `text_to_image/recall@k` for images with one or several captions.

    Image to text: the share of images that have one of their captions among the k most similar texts.
    Text to image: the share of captions that have their image among the k most similar images.

    Args:
      similarity: float [N, M], of N images with M texts.
      image_of_text: int [M], which image a text describes.
      ks: numbers of candidates that may be named.
      text_ids: int [M], equal for texts that count as one another, see `Pairs`.
    """
    images, texts = similarity.shape
    check(image_of_text.shape == (texts,), "similarity [N, M] and image_of_text [M]", similarity, image_of_text)
    pairs = Pairs(images, image_of_text, text_ids)
    return recall(retrieval_ranks(lambda i, t: similarity[i, t], pairs), ks)


def check(condition: bool, expected: str, *arrays: np.ndarray) -> None:
    """Raises a ValueError with the shapes of the arrays unless the condition holds."""
    if not condition:
        raise ValueError(f"expected {expected}; got shapes {', '.join(str(a.shape) for a in arrays)}")


def _blocks(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    return ((r, c) for r in _slices(rows, ROWS) for c in _slices(columns, COLUMNS))


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]
