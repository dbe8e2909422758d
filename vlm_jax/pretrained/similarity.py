"""Similarity of embeddings in numpy: one vector each, or one vector per token (FILIP, arXiv:2111.07783)."""

import numpy as np

ROWS, BLOCK = 16, 1 << 23  # rows of a, and token products, held at a time: 64 MB


def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the similarity of all pairs of a and b, float32 [n, m].

    Sums are float64 and rounded once. A pair's value does not depend on its block; equal embeddings tie exactly.

    Args:
      a: float [n, D] for inner products. Or [n, N, D], a vector per token, zeros for padding: the mean
        over a's tokens of the best match in b (FILIP, section 3.1), which is not symmetric in a and b.
      b: float [m, D]; or [m, M, D]; or [m, prompts, M, D], averaged over prompts (FILIP, section 3.2).
    """
    if a.ndim == 2:
        return (a.astype(np.float64, copy=False) @ b.astype(np.float64, copy=False).T).astype(np.float32)
    prompts = b if b.ndim == 4 else b[:, None]
    prompts = prompts[:, :, : np.max(np.nonzero(np.any(prompts != 0, axis=(0, 1, 3)))[0], initial=0) + 1]
    columns = max(BLOCK // (ROWS * a.shape[1] * prompts[0, ..., 0].size), 1)
    found = np.empty((len(a), len(b)), np.float32)
    for j in range(0, len(b), columns):
        some = prompts[j : j + columns].astype(np.float64)
        for i in range(0, len(a), ROWS):
            rows = a[i : i + ROWS].astype(np.float64)
            products = np.moveaxis(np.tensordot(rows, some, (2, 3)), 1, 3)  # [rows, columns, prompts, N, M]
            matches = _best_matches(products, rows[:, None, None], some)
            found[i : i + ROWS, j : j + columns] = matches.mean(axis=2)
    return found


def similarity_of_pairs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the similarity of a[i] and b[i], float64 [n].

    Both are [n, D], or they are [n, N, D] and [n, M, D].
    """
    a, b = a.astype(np.float64, copy=False), b.astype(np.float64, copy=False)
    return np.sum(a * b, axis=1) if a.ndim == 2 else _best_matches(a @ b.swapaxes(1, 2), a, b)


def _best_matches(products: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Products of tokens [..., N, M] -> [...]; tokens of a and b are [..., N | M, D]."""
    of_a, of_b = np.any(a != 0, axis=-1), np.any(b != 0, axis=-1)
    best = np.max(products, axis=-1, where=of_b[..., None, :], initial=-1)
    return np.sum(best * of_a, axis=-1) / np.maximum(np.sum(of_a, axis=-1), 1)
