"""Linear heads that need no gradient: CLIP's classifier, and Gaussians with it. Common arguments: see `heads`."""

import numpy as np
import scipy.linalg

from vlm_jax import config
from vlm_jax.errors import UserError
from vlm_jax.pretrained.linear import Linear


def zero_shot(text: np.ndarray, scale: float) -> Linear:
    """s f W': CLIP's classifier (arXiv:2103.00020, section 3.1.2), W being `text`."""
    text = unit(text, "text embeddings")
    return Linear(scale * text.T, np.zeros(len(text)))


PRIORS = {
    "uniform": lambda counts: np.full(len(counts), 1 / len(counts)),
    "frequency": lambda counts: counts / counts.sum(),
}


def gaussian(
    features: np.ndarray, labels: np.ndarray, classes: int, *, shrinkage: float | None = None, prior: str = "uniform"
) -> Linear:
    """Log densities, up to what classes share, of Gaussians with means mu_k and one covariance.

    Weights P mu_k, bias log p_k - mu_k' P mu_k / 2 (arXiv:2402.04087, equation 3). P is the inverse of the covariance:
    by default the paper's estimate (equation 4), D ((N - 1) S + tr(S) I)^-1, S being the scatter around the class means
    over N - 1, which is the authors' code's divisor.

    With a shrinkage x and prior "frequency", equal to scikit-learn's `LinearDiscriminantAnalysis(solver="lsqr",
    shrinkage=x)` for three classes and more: P = ((1 - x) S + x tr(S) / D I)^-1, S being the scatter over N.

    Args:
      features: float [N, D]; their norm does not matter.
      labels: int [N], in range(classes), at least one of each class.
      classes: C.
      shrinkage: x, from 0 to 1; None for the paper's estimate.
      prior: p_k: "uniform", as in the authors' code, or "frequency", as in `labels`.

    Raises:
      UserError: a class without examples; a covariance that has no inverse, as that of one example a class.
    """
    x = np.asarray(features, np.float64)
    if x.ndim != 2 or not len(x) or not np.isfinite(x).all():
        raise UserError(f"training features have shape {x.shape}; expected [N, D], N > 0, all finite")
    labels = check_labels(labels, len(x), classes)
    counts = np.bincount(labels, minlength=classes)
    if not counts.all():
        raise UserError(
            f"class {counts.argmin()} has no training picture; the Gaussians need one of each class at least"
        )
    if shrinkage is not None and not 0 <= shrinkage <= 1:
        raise UserError(f"shrinkage is {shrinkage}; expected a number from 0 to 1, or None for the paper's estimate")
    prior = config.choose(PRIORS, prior, "the prior of a Gaussian head")(counts)
    rows, width = x.shape
    means = (np.eye(classes)[labels].T @ x) / counts[:, None]
    centred = x - means[labels]
    scatter = centred.T @ centred
    if not np.trace(scatter) > 0:
        raise UserError("training pictures of a class are all the same: no covariance; more shots, or augmented views?")
    if shrinkage is None:
        covariance = (scatter + np.trace(scatter) / (rows - 1) * np.eye(width)) / width
    else:
        covariance = ((1 - shrinkage) * scatter + shrinkage * np.trace(scatter) / width * np.eye(width)) / rows
    try:
        weights = scipy.linalg.solve(covariance, means.T, assume_a="pos")
    except scipy.linalg.LinAlgError as error:
        raise UserError(
            f"the covariance of {rows} features of width {width} has no inverse; a larger shrinkage?"
        ) from error
    return Linear(weights, np.log(prior) - np.einsum("kd,dk->k", means, weights) / 2)


def gda(
    features: np.ndarray,
    labels: np.ndarray,
    text: np.ndarray,
    scale: float,
    *,
    alpha: float,
    shrinkage: float | None = None,
    prior: str = "uniform",
) -> Linear:
    """s f W' + alpha (logits of `gaussian`): GDA of "A Hard-to-Beat Baseline" (arXiv:2402.04087, section 3).

    The authors' code chooses alpha among 1e-4, 1e-3, ..., 100.
    """
    features, labels, text = few_shot(features, labels, text)
    first, second = zero_shot(text, scale), gaussian(features, labels, len(text), shrinkage=shrinkage, prior=prior)
    return Linear(first.weights + alpha * second.weights, first.bias + alpha * second.bias)


def few_shot(features: np.ndarray, labels: np.ndarray, text: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features and text in float64, and labels, checked against each other; a UserError says what does not fit."""
    text = unit(text, "text embeddings")
    features = unit(features, "training features", text.shape[1])
    return features, check_labels(labels, len(features), len(text)), text


def unit(x: np.ndarray, name: str, width: int | None = None) -> np.ndarray:
    """`x` in float64, or a UserError if it is not [any, width], of unit norm as far as bfloat16 can tell."""
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or not len(x) or (width is not None and x.shape[1] != width):
        raise UserError(f"{name} have shape {x.shape}; expected [rows, {width or 'width'}], as the texts have it")
    norms = np.linalg.norm(x, axis=1)
    if not np.all(np.abs(norms - 1) < 0.01):
        raise UserError(f"{name} have norms {norms.min():.3g} to {norms.max():.3g}; expected 1: divide by the norm")
    return x


def check_labels(labels: np.ndarray, rows: int, classes: int) -> np.ndarray:
    """`labels`, or a UserError if they are not [rows] integers in range(classes), rows > 0."""
    labels = np.asarray(labels)
    if labels.shape != (rows,) or not rows or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"labels are {labels.dtype} {labels.shape} of {rows} pictures; expected an integer for each")
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"labels are {labels.min()} to {labels.max()}; expected 0 to {classes - 1}, the classes")
    return labels
