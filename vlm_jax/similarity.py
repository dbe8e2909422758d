"""How alike embeddings are, in numpy: of one vector each, or of one for every token (FILIP, arXiv:2111.07783)."""

import numpy as np

BLOCK = 1 << 24  # products of tokens held at a time: 128 MB


def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How alike each of n is to each of m, float32 [n, m].

    Added up in float64 and rounded once, so that a pair's number does not depend on the block that it is computed in,
    and equal embeddings tie exactly.

    Args:
      a: float [n, D]: inner products. Or [n, N, D], a vector for every token, zeros for padding: of each token of a its
        best match in b, on average (FILIP, section 3.1), which is not what b's tokens find in a.
      b: float [m, D]; or [m, M, D], or [m, prompts, M, D], whose similarities are averaged (FILIP, section 3.2).
    """
    a, b = a.astype(np.float64, copy=False), b.astype(np.float64, copy=False)
    if a.ndim == 2:
        return (a @ b.T).astype(np.float32)
    if b.ndim == 4:
        return similarity(a, b.reshape(-1, *b.shape[2:])).reshape(len(a), *b.shape[:2]).mean(axis=2)
    rows = max(BLOCK // (a.shape[1] * b.shape[0] * b.shape[1]), 1)
    blocks = (a[i : i + rows] for i in range(0, len(a), rows))
    products = (np.moveaxis(np.tensordot(block, b, (2, 2)), 1, 2) for block in blocks)  # [rows, m, N, M]
    blocks = (a[i : i + rows, None] for i in range(0, len(a), rows))
    return np.concatenate([_best_matches(*each, b) for each in zip(products, blocks, strict=True)]).astype(np.float32)


def similarity_of_pairs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The same of each of n with its own, [n, D] or [n, N, D] and [n, M, D], float64 [n]."""
    a, b = a.astype(np.float64, copy=False), b.astype(np.float64, copy=False)
    return np.sum(a * b, axis=1) if a.ndim == 2 else _best_matches(a @ b.swapaxes(1, 2), a, b)


def _best_matches(products: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Products of tokens [..., N, M] -> [...]; tokens of a and b are [..., N | M, D]."""
    of_a, of_b = np.any(a != 0, axis=-1), np.any(b != 0, axis=-1)
    best = np.max(products, axis=-1, where=of_b[..., None, :], initial=-1)
    return np.sum(best * of_a, axis=-1) / np.maximum(np.sum(of_a, axis=-1), 1)
