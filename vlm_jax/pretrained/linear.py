"""Linear classifiers on features, exact, on the host in float64: ridge regression and logistic regression."""

from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.optimize
import scipy.special

from vlm_jax.errors import UserError

TOLERANCE = 1e-8  # bound of the largest derivative of the mean loss
STEPS = 10_000


class Linear(NamedTuple):
    """A linear classifier: scores = features @ weights + bias.

    Attributes:
      weights: float64 [D, C].
      bias: float64 [C].
    """

    weights: np.ndarray
    bias: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Returns scores, float64 [N, C], of features [N, D]."""
        return np.asarray(features, np.float64) @ self.weights + self.bias


def ridge(features: np.ndarray, labels: np.ndarray, classes: int, l2: float) -> Linear:
    """Minimizes sum_i |W' x_i + b - y_i|^2 + l2 |W|^2 in closed form.

    y_i is 1 for the label and -1 for other classes; b is not regularised. This is the few-shot probe of ViT
    (arXiv:2010.11929, section 4.1). Equal to scikit-learn's `RidgeClassifier(alpha=l2)` for three classes and more; for
    two classes, scikit-learn has one column, our second.

    Args:
      features: x, float [N, D].
      labels: int [N], in range(classes).
      classes: C.
      l2: above 0.
    """
    x, labels = _checked(features, labels, classes, l2)
    targets = 2.0 * np.eye(classes)[labels] - 1
    mean, mean_target = x.mean(0), targets.mean(0)
    x, y = x - mean, targets - mean_target
    wide = len(x) < x.shape[1]  # the smaller of two equal systems
    weights = x.T @ _solve(x @ x.T, y, l2) if wide else _solve(x.T @ x, x.T @ y, l2)
    return Linear(weights, mean_target - mean @ weights)


def logistic_regression(features: np.ndarray, labels: np.ndarray, classes: int, l2: float) -> Linear:
    """Minimizes sum_i -log softmax(W' x_i + b)[label_i] + l2 / 2 |W|^2 by L-BFGS.

    This is the linear probe of CLIP (arXiv:2103.00020, appendix A.3). b sums to 0. Equal to scikit-learn's
    `LogisticRegression(C=1 / l2)` for three classes and more; for two classes, scikit-learn has one weight vector,
    which equals ours with l2 twice as large. A class without examples has weights 0 and bias -inf.

    Args: as for `ridge`.

    Raises:
      UserError: there is only one class, or the minimum is not reached.
    """
    x, labels = _checked(features, labels, classes, l2)
    present, labels = np.unique(labels, return_inverse=True)
    if len(present) < 2:
        raise UserError(f"all {len(x)} training pictures are of one class; a classifier needs two at least")
    (rows, width), count = x.shape, len(present)
    mean, one_hot = x.mean(0), np.eye(count)[labels]
    # Searching along the principal axes, with each class's weights scaled by about the curvature, reaches the same
    # minimum in far fewer steps. The last weight is the bias.
    variance, axes = np.linalg.eigh((x - mean).T @ (x - mean) / rows)
    x = np.concatenate([(x - mean) @ axes, np.ones((rows, 1))], axis=1)
    decay = np.append(np.full(width, l2 / rows), 0.0)[:, None]
    share = one_hot.mean(0)
    scale = 1 / np.sqrt(np.append(np.maximum(variance, 0), 1.0)[:, None] * share * (1 - share) + decay)

    def weights_of(flat):
        """[D + 1, C], centred over classes as at the minimum: a shift of all classes changes no probability."""
        scaled = flat.reshape(width + 1, count) * scale
        return scaled - scaled.mean(1, keepdims=True)

    def loss(flat):
        weights = weights_of(flat)
        logits = x @ weights
        log_z = scipy.special.logsumexp(logits, axis=1, keepdims=True)
        value = (np.sum(log_z) - np.sum(logits * one_hot)) / rows + np.sum(decay * weights**2) / 2
        gradient = x.T @ (np.exp(logits - log_z) - one_hot) / rows + decay * weights
        return value, (gradient * scale).ravel()

    options = dict(maxiter=STEPS, maxfun=STEPS, ftol=0.0, gtol=TOLERANCE, maxcor=20)
    found = scipy.optimize.minimize(loss, np.zeros((width + 1) * count), jac=True, method="L-BFGS-B", options=options)
    steepest = np.abs(found.jac).max()
    if not steepest < 100 * TOLERANCE:
        raise UserError(
            f"logistic regression is not done after {found.nit} steps (gradient {steepest:.1e}); try a larger l2"
        )
    solution = weights_of(found.x)
    weights, bias = np.zeros((width, classes)), np.full(classes, -np.inf)
    weights[:, present] = axes @ solution[:-1]
    bias[present] = solution[-1] - mean @ weights[:, present]
    return Linear(weights, bias)


def _checked(features: np.ndarray, labels: np.ndarray, classes: int, l2: float) -> tuple[np.ndarray, np.ndarray]:
    features, labels = np.asarray(features, np.float64), np.asarray(labels)
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(features):
        raise UserError(f"a probe takes features [N, D] and labels [N], N > 0; got {features.shape}, {labels.shape}")
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"labels are {labels.min()} to {labels.max()}; expected 0 to {classes - 1}, the classes")
    if not l2 > 0:
        raise UserError(f"l2 is {l2}; expected a number above 0")
    if not np.isfinite(features).all():
        raise UserError("features are not finite: the model has diverged, or its pictures are not normalised")
    return features, labels


def _solve(gram: np.ndarray, right: np.ndarray, l2: float) -> np.ndarray:
    return scipy.linalg.solve(gram + l2 * np.eye(len(gram)), right, assume_a="pos")
