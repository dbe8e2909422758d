"""Ranks of the right candidate, the best candidates, and recalls: N queries, M candidates.

Functions that compare all with all take scores block by block, `scores(rows, columns) -> [rows, columns]`; the full
matrix need not exist: `lambda i, t: similarity(images[i], texts[t])`, or `lambda i, t: matrix[i, t]`.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

ROWS, COLUMNS = 1024, 4096  # of a block: 32 MB in float64

Scores = Callable[[slice, slice], np.ndarray]


def truth_ranks(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Returns how many candidates stand before the true one, int [N]: 0 is right.

    Equal scores are ordered by index, as in a stable sort. A true candidate with score NaN stands last (rank M): a
    model that has diverged gets nothing right.

    Args:
      scores: float [N, M], higher is better.
      truth: int [N], index of the true candidate.
    """
    check(scores.ndim == 2 and truth.shape == scores.shape[:1], "scores [N, M] and truth [N]", scores, truth)
    ranks = np.empty(len(scores), np.int64)
    for rows in _slices(len(scores), ROWS):
        own = np.take_along_axis(scores[rows], truth[rows, None], axis=1)
        before = _before(scores[rows], own, np.arange(scores.shape[1]) < truth[rows, None])
        ranks[rows] = np.where(np.isnan(own[:, 0]), scores.shape[1], before.sum(axis=1))
    return ranks


def top_k(scores: Scores, queries: int, candidates: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the `k` best candidates of each query, int [N, k], and their scores, float [N, k], best first.

    Equal scores are ordered by index. Memory: one block.

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


def retrieval_ranks(scores: Scores, images: int, image_of_text: np.ndarray) -> dict[str, np.ndarray]:
    """Returns how many candidates stand before the right one: `image_to_text` int [N], `text_to_image` int [M].

    An image with several texts has the rank of its best text. Ties and NaN as in `truth_ranks`. Each block of scores
    is computed once for both directions, blocks with pairs twice. Memory: one block and a few numbers for each row.

    Args:
      scores: the similarity of images (rows) and texts (columns), block by block.
      images: N.
      image_of_text: int [M], which image a text describes.
    """
    texts, owner = len(image_of_text), image_of_text
    captions = np.bincount(owner, minlength=images)
    check(len(captions) == images and captions.all(), "a caption for each image", captions, owner)
    own = np.empty(texts)  # the score of each text with its image
    for rows, columns in _blocks(images, texts):
        here = np.flatnonzero((owner[columns] >= rows.start) & (owner[columns] < rows.stop))
        if len(here):
            own[columns.start + here] = scores(rows, columns)[owner[columns][here] - rows.start, here]
    order = np.lexsort((-np.where(np.isnan(own), np.inf, own), owner))  # stable: the first of equals
    best = order[np.unique(owner[order], return_index=True)[1]]  # the most similar of an image's texts, [N]
    of_image, of_text = np.zeros(images, np.int64), np.zeros(texts, np.int64)
    for rows, columns in _blocks(images, texts):
        block = scores(rows, columns)
        index = np.arange(columns.start, columns.stop)
        of_image[rows] += _before(block, own[best[rows], None], index < best[rows, None]).sum(axis=1)
        index = np.arange(rows.start, rows.stop)[:, None]
        of_text[columns] += _before(block, own[columns], index < owner[columns]).sum(axis=0)
    of_image[np.isnan(own[best])], of_text[np.isnan(own)] = texts, images
    return {"image_to_text": of_image, "text_to_image": of_text}


def recall(ranks: dict[str, np.ndarray], ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Returns `name/recall@k`, the share of ranks below k (Karpathy & Fei-Fei 2015, arXiv:1412.2306, section 4.1)."""
    return {f"{name}/recall@{k}": float(np.mean(rank < k)) for name, rank in ranks.items() for k in ks}


def retrieval_recall(
    similarity: np.ndarray, image_of_text: np.ndarray, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Returns `image_to_text/recall@k` and `text_to_image/recall@k` for images with one or several captions.

    Image to text: the share of images that have one of their captions among the k most similar texts.
    Text to image: the share of captions that have their image among the k most similar images.

    Args:
      similarity: float [N, M], of N images with M texts.
      image_of_text: int [M], which image a text describes.
      ks: numbers of candidates that may be named.
    """
    images, texts = similarity.shape
    check(image_of_text.shape == (texts,), "similarity [N, M] and image_of_text [M]", similarity, image_of_text)
    return recall(retrieval_ranks(lambda i, t: similarity[i, t], images, image_of_text), ks)


def check(condition: bool, expected: str, *arrays: np.ndarray) -> None:
    """Raises a ValueError with the shapes of the arrays unless the condition holds."""
    if not condition:
        raise ValueError(f"expected {expected}; got shapes {', '.join(str(a.shape) for a in arrays)}")


def _before(scores: np.ndarray, own: np.ndarray, earlier: np.ndarray) -> np.ndarray:
    return (scores > own) | ((scores == own) & earlier)


def _blocks(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    return ((r, c) for r in _slices(rows, ROWS) for c in _slices(columns, COLUMNS))


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]
