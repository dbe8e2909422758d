"""How alike embeddings are, in numpy: of one vector each, or of one for every token (FILIP, arXiv:2111.07783)."""

import numpy as np

ROWS, BLOCK = 16, 1 << 23  # of a, and products of tokens, held at a time: 64 MB


def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How alike each of n is to each of m, float32 [n, m].

    Added up in float64 and rounded once, so that a pair's number does not depend on the block that it is computed in,
    and equal embeddings tie exactly.

    Args:
      a: float [n, D]: inner products. Or [n, N, D], a vector for every token, zeros for padding: of each token of a its
        best match in b, on average (FILIP, section 3.1), which is not what b's tokens find in a.
      b: float [m, D]; or [m, M, D], or [m, prompts, M, D], whose similarities are averaged (FILIP, section 3.2).
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
    """The same of each of n with its own, [n, D] or [n, N, D] and [n, M, D], float64 [n]."""
    a, b = a.astype(np.float64, copy=False), b.astype(np.float64, copy=False)
    return np.sum(a * b, axis=1) if a.ndim == 2 else _best_matches(a @ b.swapaxes(1, 2), a, b)


def _best_matches(products: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Products of tokens [..., N, M] -> [...]; tokens of a and b are [..., N | M, D]."""
    of_a, of_b = np.any(a != 0, axis=-1), np.any(b != 0, axis=-1)
    best = np.max(products, axis=-1, where=of_b[..., None, :], initial=-1)
    return np.sum(best * of_a, axis=-1) / np.maximum(np.sum(of_a, axis=-1), 1)
