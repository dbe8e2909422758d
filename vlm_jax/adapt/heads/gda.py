"""Gaussian discriminant analysis with the class names, without a gradient. Common arguments: see `heads`."""

import numpy as np
import scipy.linalg

from vlm_jax import config
from vlm_jax.adapt.heads.checks import check_labels, few_shot
from vlm_jax.adapt.heads.linear import zero_shot
from vlm_jax.adapt.heads.search import searches
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.pretrained.linear import Linear

PRIORS = {
    "uniform": lambda counts: np.full(len(counts), 1 / len(counts)),
    "frequency": lambda counts: counts / counts.sum(),
}


def gaussian(
    features: np.ndarray, labels: np.ndarray, classes: int, *, shrinkage: float | None = None, prior: str = "uniform"
) -> Linear:
    """Log densities of Gaussians with means mu_k and one covariance, without the terms common to all classes.

    Weights P mu_k, bias log p_k - mu_k' P mu_k / 2 (arXiv:2402.04087, equation 3). P is the inverse of the covariance.
    P defaults to the paper's estimate (equation 4), D ((N - 1) S + tr(S) I)^-1. S is the scatter around the class means
    over N - 1, the divisor of the authors' code.

    With a shrinkage x, P = ((1 - x) S + x tr(S) / D I)^-1, and S is the scatter over N. With prior "frequency" this
    equals scikit-learn's `LinearDiscriminantAnalysis(solver="lsqr", shrinkage=x)` for three classes and more.

    Args:
      features: float [N, D], of any norm.
      labels: int [N], in range(classes), at least one of each class.
      classes: C.
      shrinkage: x, from 0 to 1; None for the paper's estimate.
      prior: p_k: "uniform", as in the authors' code, or "frequency", as in `labels`.

    Raises:
      UserError: a class has no examples; the covariance has no inverse, for instance with one example of each class.
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


@method(
    family="heads",
    system="GDA-CLIP",
    paper="arXiv:2402.04087",
    where="section 3",
    differs="Gaussians with one covariance, added to the class names",
    claim="few_shot: GDA above zero-shot and a linear probe",
)
@searches({"alpha": [10.0**k for k in range(-4, 3)]})
def gda(
    features: np.ndarray,
    labels: np.ndarray,
    text: np.ndarray,
    scale: float,
    *,
    alpha: float = 1.0,
    shrinkage: float | None = None,
    prior: str = "uniform",
) -> Linear:
    """s f W' + alpha (logits of `gaussian`): GDA of "A Hard-to-Beat Baseline" (arXiv:2402.04087, section 3).

    The authors' code chooses alpha among 1e-4, 1e-3, ..., 100.
    """
    features, labels, text = few_shot(features, labels, text)
    first, second = zero_shot(text, scale), gaussian(features, labels, len(text), shrinkage=shrinkage, prior=prior)
    return Linear(first.weights + alpha * second.weights, first.bias + alpha * second.bias)
