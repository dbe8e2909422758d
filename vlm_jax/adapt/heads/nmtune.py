"""NMTune: an MLP that reshapes features which noisy pretraining has shaped, and a linear classifier."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vlm_jax.adapt.heads.checks import few_shot
from vlm_jax.adapt.heads.search import searches
from vlm_jax.adapt.heads.training import cross_entropy, descend, finite, matmul, shuffled
from vlm_jax.catalogue import method


class Reshaped(NamedTuple):
    """Logits of Z = relu(x A + a) B + b: Z W + w.

    Attributes:
      hidden, hidden_bias: A [D, D] and a [D].
      out, out_bias: B [D, D] and b [D].
      weights, bias: W [D, C] and w [C].
    """

    hidden: np.ndarray
    hidden_bias: np.ndarray
    out: np.ndarray
    out_bias: np.ndarray
    weights: np.ndarray
    bias: np.ndarray

    def features(self, x):
        """[M, D] -> Z [M, D]."""
        return matmul(jax.nn.relu(matmul(x, self.hidden) + self.hidden_bias), self.out) + self.out_bias

    def logits(self, z):
        """[M, D] -> [M, C]."""
        return matmul(z, self.weights) + self.bias

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Features [M, D] -> logits, float64 [M, C]."""
        return np.asarray(self.logits(self.features(np.asarray(features, np.float32))), np.float64)


def regularizers(f: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (consistency, covariance, dominance) of features F and Z, [M, D] each.

        mean_i |F_i / |F_i| - Z_i / |Z_i||^2,   sum over i != j of Cov(Z)_ij^2 / D,   - s_1 / sum_j s_j

    s are the singular values of Z, the largest first.
    """
    unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    centred = z - jnp.mean(z, axis=0)
    covariance = matmul(centred.T, centred) / max(len(z) - 1, 1)
    apart = jnp.sum(covariance**2) - jnp.sum(jnp.diag(covariance) ** 2)
    singular = jnp.linalg.svd(z, compute_uv=False)
    return jnp.mean(jnp.sum((unit(f) - unit(z)) ** 2, axis=1)), apart / z.shape[1], -singular[0] / jnp.sum(singular)


@method(
    family="heads",
    paper="arXiv:2309.17002",
    differs="an MLP keeps features' directions, makes dimensions independent and one of them large",
)
@searches({"learning_rate": [1e-3, 1e-2]})
def nmtune(
    features: np.ndarray,
    labels: np.ndarray,
    text: np.ndarray,
    scale: float,
    *,
    weight: float = 0.01,
    steps: int = 500,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-4,
    seed: int = 0,
) -> Reshaped:
    """NMTune (Chen et al. 2024): cross-entropy + weight * the sum of `regularizers`, by AdamW under a cosine.

    A black-box method: `text` gives only the number of classes, `scale` is not used.

    Args:
      weight: of the regularizers; 0 is an MLP.
      steps, batch_size, learning_rate, weight_decay: of the training. An epoch's last batch, if short, is left out.
      seed: of the initial weights and of the order of examples.
      others: see `heads`.
    """
    features, labels, text = few_shot(features, labels, text)
    count, width = features.shape
    size = min(batch_size, count)
    rows = shuffled(count, size, -(-steps // (count // size)), seed)
    rows = rows[(rows >= 0).all(1)][:steps]
    rng = np.random.default_rng(seed)
    draw = lambda n, m: (rng.standard_normal((n, m)) * np.sqrt(2 / n)).astype(np.float32)
    zeros = lambda n: np.zeros(n, np.float32)
    begun = Reshaped(
        draw(width, width), zeros(width), draw(width, width), zeros(width),
        draw(width, len(text)) / 10, zeros(len(text)),
    )  # fmt: skip
    trained, losses = _train(rows, features.astype(np.float32), labels, begun, weight, learning_rate, weight_decay)
    return jax.tree.map(lambda leaf: finite(leaf, losses), trained)


@jax.jit
def _train(rows, features, labels, begun, weight, learning_rate, weight_decay):
    def loss(head, rows):
        z = head.features(features[rows])
        return cross_entropy(head.logits(z), labels[rows]) + weight * sum(regularizers(features[rows], z))

    optimizer = optax.adamw(optax.cosine_decay_schedule(learning_rate, len(rows)), weight_decay=weight_decay)
    return descend(loss, begun, optimizer, rows)
