"""The image tower's last projection, trained on cached inputs of the projection."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vlm_jax import config
from vlm_jax.adapt.heads.checks import check_labels, unit
from vlm_jax.adapt.heads.linear import zero_shot
from vlm_jax.adapt.heads.training import EPS, cross_entropy, descend, finite, matmul
from vlm_jax.errors import UserError


class Projected(NamedTuple):
    """Logits s normalise(x K + b) W' of features x before the projection.

    Attributes:
      text: W, float [C, D].
      scale: s.
      kernel: K, float [E, D].
      bias: b, float [D], or None for 0.
    """

    text: np.ndarray
    scale: float
    kernel: np.ndarray
    bias: np.ndarray | None = None

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Features before the projection [M, E] -> logits, float64 [M, C]."""
        x = np.asarray(features, np.float64) @ self.kernel + (0 if self.bias is None else self.bias)
        return zero_shot(self.text, self.scale)(x / np.linalg.norm(x, axis=1, keepdims=True))


PULLS = {"1/N": lambda shots: 1 / shots, "1/N^2": lambda shots: 1 / shots**2}


def train_projection(
    features: np.ndarray,
    labels: np.ndarray,
    text: np.ndarray,
    scale: float,
    kernel: np.ndarray,
    bias: np.ndarray | None = None,
    *,
    pull: float | str = "1/N",
    steps: int = 300,
    learning_rate: float = 1e-5,
) -> Projected:
    """ProLIP (arXiv:2410.05270): trains the image tower's last projection K; the bias b stays.

    Minimises the mean cross-entropy of s normalise(x K + b) W' plus lambda |K - K_0|_F^2 by Adam, with all examples at
    each step, under a cosine schedule to 0. Defaults are of the authors' code. Adam's steps have about the size of the
    learning rate, however large lambda is: a large lambda keeps K about that near K_0, not on K_0.

    Args:
      features: x, float [N, E], the projection's input; or [A, N, E] for A augmented views, step i on view i mod A. The
        authors use one view for each step.
      labels: int [N].
      text: W, as in `heads`.
      scale: s.
      kernel: K_0, float [E, D].
      bias: b, float [D], or None.
      pull: lambda: a number, "1/N" or "1/N^2"; N is the mean number of training pictures of a class.
      steps: 0 gives the model's own kernel, the zero-shot classifier.
      learning_rate: the initial one; the paper tries 1e-5 to 1e-2.
    """
    views, kernel = np.asarray(features, np.float32), np.asarray(kernel, np.float32)
    text = unit(text, "text embeddings")
    views = views[None] if views.ndim == 2 else views
    offset = np.zeros(text.shape[1], np.float32) if bias is None else np.asarray(bias, np.float32)
    if views.ndim != 3 or kernel.shape != (views.shape[2], text.shape[1]) or offset.shape != kernel.shape[1:]:
        raise UserError(
            f"features {np.shape(features)}, kernel {kernel.shape}, bias {offset.shape}, text {text.shape} do not fit;"
            " expected [N, E] (or [A, N, E]), [E, D], [D], [C, D]"
        )
    labels = check_labels(labels, views.shape[1], len(text))
    if isinstance(pull, str):
        pull = config.choose(PULLS, pull, "the pull of ProLIP, if not a number,")(len(labels) / len(np.unique(labels)))
    if steps:
        order = np.arange(steps) % len(views)
        trained, losses = _train_projection(order, views, labels, text, scale, kernel, offset, pull, learning_rate)
        kernel = finite(trained, losses)
    return Projected(text, scale, kernel, bias)


@jax.jit
def _train_projection(order, views, labels, text, scale, start, bias, pull, learning_rate):
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, len(order)), eps=EPS)

    def loss(kernel, view):
        x = matmul(views[view], kernel) + bias
        x = x / jnp.linalg.norm(x, axis=1, keepdims=True)
        return cross_entropy(scale * matmul(x, text.T), labels) + pull * jnp.sum((kernel - start) ** 2)

    return descend(loss, start, optimizer, order)
