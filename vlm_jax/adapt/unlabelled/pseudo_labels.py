"""Labels that a model itself gives to pictures: the most probable of each class, labels spread over neighbours."""

import numpy as np
import scipy.linalg
import scipy.special

from vlm_jax.adapt.heads.checks import unit
from vlm_jax.errors import UserError


def top_of_each_class(logits: np.ndarray, k: int, classes: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Returns (rows, labels), int [k * classes] each: the k pictures of largest probability of each class.

    As many of each class, whatever the model prefers; a picture may be among the k of several classes. Probabilities
    are the softmax over `classes`; of equal ones the first row counts.

    Args:
      logits: float [N, C].
      k: pictures of each class, 1 to N; the order of the result is by class, then by probability.
      classes: int, those to label; defaults to all.
    """
    logits = np.asarray(logits, np.float64)
    classes = np.arange(logits.shape[1]) if classes is None else np.asarray(classes)
    if not 1 <= k <= len(logits):
        raise UserError(f"{k} pseudo-labels for each class of {len(logits)} pictures; expected 1 to {len(logits)}")
    chosen = logits[:, classes]
    shares = chosen - scipy.special.logsumexp(chosen, axis=1, keepdims=True)
    rows = np.argsort(-shares, axis=0, kind="stable")[:k]
    return rows.T.ravel(), np.repeat(classes, k)


def without_first_directions(text: np.ndarray, drop: int = 1, rank: int | None = None) -> np.ndarray:
    """Returns the projection onto the span of class embeddings without what they share, float64 [D, D].

    U_> U_>' for text' = U S V', where U_> lacks the first `drop` columns: the direction that all prompts have in common
    (the projection space of ReCLIP, arXiv:2308.03793).

    Args:
      text: float [C, D].
      drop: number of directions of the largest singular values to leave out; 0 keeps the whole span.
      rank: directions of smaller singular values are left out from this one on; None: no others.
    """
    text = np.asarray(text, np.float64)
    _, singular, directions = np.linalg.svd(text, full_matrices=False)
    count = int(np.sum(singular > singular[0] * max(text.shape) * np.finfo(np.float64).eps))
    if not 0 <= drop < min(count, rank or count):
        raise UserError(f"drop is {drop}, of {min(count, rank or count)} directions of the names; expected fewer")
    kept = directions[drop : min(count, rank or count)]
    return kept.T @ kept


def propagated(features: np.ndarray, text: np.ndarray, k: int = 20, alpha: float = 0.99) -> np.ndarray:
    """Returns scores float64 [C + N, C] of class names and pictures: labels of the names, spread over neighbours.

        Z = (I - alpha D^-1/2 W D^-1/2)^-1 Y

    W = (A + A') / 2, where A keeps of the affinities (1 + cos) / 2 of each point its k largest, without itself; D is
    the diagonal of W's row sums; Y is 1 at each name's own class (label propagation, as in ReCLIP). The names are the
    first C points. The system is solved exactly, with [C + N, C + N] numbers in memory.

    Args:
      features: of the pictures, float [N, D].
      text: of the classes, float [C, D]; both need not have unit norm.
      k: neighbours of a point, at most all others.
      alpha: in [0, 1): how far labels spread.
    """
    if k < 1 or not 0 <= alpha < 1:
        raise UserError(f"label propagation has k {k}, alpha {alpha}; expected 1 or more, and 0 to less than 1")
    points = np.concatenate([text, features]).astype(np.float64)
    points /= np.maximum(np.linalg.norm(points, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    affinity = (1 + points @ points.T) / 2
    np.fill_diagonal(affinity, -1)  # last of all
    near = np.argsort(-affinity, axis=1, kind="stable")[:, : min(k, len(points) - 1)]
    kept = np.zeros_like(affinity)
    np.put_along_axis(kept, near, np.take_along_axis(affinity, near, axis=1), axis=1)
    weights = (kept + kept.T) / 2
    roots = np.sqrt(np.maximum(weights.sum(1), np.finfo(np.float64).tiny))
    system = np.eye(len(points)) - alpha * weights / roots[:, None] / roots
    return scipy.linalg.solve(system, np.eye(len(points), len(text)), assume_a="pos")


def by_neighbours(
    features: np.ndarray, text: np.ndarray, projection: np.ndarray | None = None, k: int = 20, alpha: float = 0.99
) -> np.ndarray:
    """Returns pseudo-labels int [N] of pictures: the largest score of `propagated`.

    Args:
      features, text: unit norm, float [N, D] and [C, D].
      projection: float [D, D], of both, such as `without_first_directions`; None: none.
      k, alpha: see `propagated`.
    """
    text = unit(text, "text embeddings")
    features = unit(features, "features of the pool", text.shape[1])
    if projection is not None:
        features, text = features @ projection, text @ projection
    return propagated(features, text, k, alpha)[len(text) :].argmax(1)
