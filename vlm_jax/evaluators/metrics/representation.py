"""What embeddings look like as a set: gap, alignment, uniformity, rank, and how alike two sets are."""

import numpy as np
from numpy.linalg import norm

from vlm_jax.evaluators.metrics.ranking import check, top_k
from vlm_jax.pretrained import unit

ROWS = 1024  # rows compared with all others at a time


def modality_gap(image: np.ndarray, text: np.ndarray) -> float:
    """Returns |mean of image - mean of text| (Liang et al. 2022, arXiv:2203.02053, section 2); [n, D] and [m, D]."""
    return float(norm(np.mean(image, axis=0, dtype=np.float64) - np.mean(text, axis=0, dtype=np.float64)))


def alignment(x: np.ndarray, y: np.ndarray) -> float:
    """Returns the mean squared distance of the pairs of x and y, [n, D] each (Wang and Isola 2020, arXiv:2005.10242,
    section 4, alpha = 2)."""
    check(x.shape == y.shape and x.ndim == 2, "two arrays [n, D]", x, y)
    return float(np.mean(np.sum((np.asarray(x, np.float64) - y) ** 2, axis=1)))


def uniformity(x: np.ndarray, t: float = 2.0) -> float:
    """Returns log of the mean of exp(-t |x_i - x_j|^2) over pairs i < j (Wang and Isola 2020, section 4).

    Args:
      x: float [n, D], of unit norm, n > 1.
      t: inverse width of the kernel.
    """
    check(x.ndim == 2 and len(x) > 1, "at least two rows, [n, D]", x)
    x, total = np.asarray(x, np.float64), 0.0
    norms = (x**2).sum(axis=1)
    for start in range(0, len(x), ROWS):
        rows = slice(start, start + ROWS)
        squared = norms[rows, None] + norms - 2 * x[rows] @ x.T
        total += np.exp(-t * squared)[np.arange(len(x)) > np.arange(start, start + len(squared))[:, None]].sum()
    return float(np.log(total / (len(x) * (len(x) - 1) / 2)))


def effective_rank(x: np.ndarray) -> float:
    """Returns exp(-sum_i p_i log p_i), p the singular values of x [n, D], divided by their sum (Roy and Vetterli 2007,
    "The effective rank"): 1 for a line, min(n, D) for equal singular values."""
    values = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    p = values[values > 0] / max(values.sum(), np.finfo(np.float64).tiny)
    return float(np.exp(-np.sum(p * np.log(p))))


def cka(x: np.ndarray, y: np.ndarray) -> float:
    """Returns the linear centred kernel alignment |Y'X|^2 / (|X'X| |Y'Y|) of centred columns (Kornblith et al. 2019,
    arXiv:1905.00414, section 3): 1 for rotations and scales of one another.

    Args:
      x: float [n, D].
      y: float [n, E], of the same examples.
    """
    check(x.ndim == y.ndim == 2 and len(x) == len(y), "arrays [n, D] and [n, E]", x, y)
    x, y = (np.asarray(one, np.float64) - np.mean(one, axis=0, dtype=np.float64) for one in (x, y))
    return float(norm(y.T @ x) ** 2 / (norm(x.T @ x) * norm(y.T @ y)))


def neighbour_overlap(x: np.ndarray, y: np.ndarray, k: int = 10) -> float:
    """Returns the mean share of an example's k nearest others by the cosine of x that are among those by that of y
    (mutual k-nearest neighbours, Huh et al. 2024, arXiv:2405.07987).

    Args:
      x: float [n, D], n > k.
      y: float [n, E], of the same examples.
      k: number of neighbours.
    """
    check(x.ndim == y.ndim == 2 and len(x) == len(y) > k, f"more than {k} rows, [n, D] and [n, E]", x, y)

    def nearest(one: np.ndarray) -> np.ndarray:
        one, place = unit(np.asarray(one, np.float64)), np.arange(len(one))
        cosines = lambda i, j: np.where(place[i, None] == place[j], -np.inf, one[i] @ one[j].T)
        return top_k(cosines, len(one), len(one), k)[0]

    shared = nearest(x)[:, :, None] == nearest(y)[:, None]
    return float(shared.sum(axis=(1, 2)).mean() / k)


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """Returns |m_x - m_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^1/2) of means and covariances of x [n, D] and y [m, D], the
    distance of two Gaussians (Dowson and Landau 1982)."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    covariances = [np.cov(one, rowvar=False).reshape(one.shape[1], -1) for one in (x, y)]
    values, vectors = np.linalg.eigh(covariances[0])
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    both = np.linalg.eigvalsh(root @ covariances[1] @ root)  # those of S_x S_y
    apart = np.sum((x.mean(axis=0) - y.mean(axis=0)) ** 2)
    return float(apart + sum(map(np.trace, covariances)) - 2 * np.sum(np.sqrt(np.maximum(both, 0))))


def integration_rate(layers: list[tuple[np.ndarray, np.ndarray]]) -> tuple[float, np.ndarray]:
    """Returns the modality integration rate, log10 of the sum of `frechet` over layers, and the distance of each layer
    (Huang et al. 2024, arXiv:2410.07167): low where a language model holds pictures as it holds texts.

    In a layer both sets are divided by the mean norm of the texts' tokens. Tokens whose norm is more than three
    standard deviations from the set's median norm then become the set's median, coordinate by coordinate (as in the
    authors' code).

    Args:
      layers: for each layer the tokens of pictures, float [n, D], and of texts, [m, D].
    """
    distances = []
    for pictures, texts in layers:
        unit = np.mean(norm(np.asarray(texts, np.float64), axis=1))
        distances.append(frechet(*(_without_outliers(np.asarray(one, np.float64) / unit) for one in (pictures, texts))))
    return float(np.log10(sum(distances))), np.array(distances)


def _without_outliers(tokens: np.ndarray) -> np.ndarray:
    norms = norm(tokens, axis=1)
    far = np.abs(norms - np.median(norms)) > 3 * norms.std(ddof=1)
    return np.where(far[:, None], np.median(tokens, axis=0), tokens)
