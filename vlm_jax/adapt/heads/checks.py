"""Checks of the arguments of heads: features, labels and texts that fit each other."""

import numpy as np

from vlm_jax.errors import UserError


def few_shot(features: np.ndarray, labels: np.ndarray, text: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns features and text in float64, and labels; raises a UserError if shapes or norms do not fit."""
    text = unit(text, "text embeddings")
    features = unit(features, "training features", text.shape[1])
    return features, check_labels(labels, len(features), len(text)), text


def unit(x: np.ndarray, name: str, width: int | None = None) -> np.ndarray:
    """Returns `x` in float64; raises a UserError unless `x` is [any, width], of unit norm to bfloat16's precision."""
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or not len(x) or (width is not None and x.shape[1] != width):
        raise UserError(f"{name} have shape {x.shape}; expected [rows, {width or 'width'}], the texts' width")
    norms = np.linalg.norm(x, axis=1)
    if not np.all(np.abs(norms - 1) < 0.01):
        raise UserError(f"{name} have norms {norms.min():.3g} to {norms.max():.3g}; expected 1: divide by the norm")
    return x


def check_labels(labels: np.ndarray, rows: int, classes: int) -> np.ndarray:
    """Returns `labels`; raises a UserError unless `labels` are [rows] integers in range(classes), rows > 0."""
    labels = np.asarray(labels)
    if labels.shape != (rows,) or not rows or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"labels are {labels.dtype} {labels.shape} of {rows} pictures; expected an integer for each")
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"labels are {labels.min()} to {labels.max()}; expected 0 to {classes - 1}, the classes")
    return labels
