"""Heads that compare pictures with a cache of the training pictures. Common arguments: see `heads`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vlm_jax.adapt.heads.checks import few_shot
from vlm_jax.adapt.heads.linear import zero_shot
from vlm_jax.adapt.heads.search import searches
from vlm_jax.adapt.heads.training import EPS, cross_entropy, descend, finite, matmul, shuffled
from vlm_jax.catalogue import method

ALPHAS, BETAS = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0], [0.3, 1.0, 2.0, 3.5, 5.5, 8.0]


class TipAdapter(NamedTuple):
    """Logits alpha exp(-beta (1 - f F')) L + s f W'; the first term in float32, with [M, N] numbers in memory.

    Attributes:
      text: W, float [C, D].
      scale: s.
      keys: F, float [N, D].
      labels: int [N], whose one-hot rows are L.
      alpha: weight of the cache.
      beta: how fast an affinity falls with distance.
    """

    text: np.ndarray
    scale: float
    keys: np.ndarray
    labels: np.ndarray
    alpha: float
    beta: float

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Features [M, D] -> logits, float64 [M, C]."""
        cached = _cache_logits(np.asarray(features), self.keys, np.eye(len(self.text))[self.labels], self.beta)
        return zero_shot(self.text, self.scale)(features) + self.alpha * np.asarray(cached, np.float64)


@method(family="heads", paper="arXiv:2207.09519", where="eq. 3 to 6", differs="a cache of training features and labels")
@searches(refine={"alpha": ALPHAS, "beta": BETAS})
def tip_adapter(
    features: np.ndarray, labels: np.ndarray, text: np.ndarray, scale: float, *, alpha: float = 1.0, beta: float = 5.5
) -> TipAdapter:
    """Tip-Adapter (arXiv:2207.09519, equations 3 to 6): a cache of training features and their labels."""
    features, labels, text = few_shot(features, labels, text)
    return TipAdapter(text, scale, features, labels, alpha, beta)


def cache_logits(features: jax.Array, keys: jax.Array, values: jax.Array, beta: jax.Array) -> jax.Array:
    """exp(-beta (1 - f F')) L: features f [M, D], keys F [N, D], values L [N, C] -> [M, C]."""
    affinity = jnp.exp(-beta * (1 - jnp.matmul(features, keys.T, precision="highest")))
    return jnp.matmul(affinity, values, precision="highest")


_cache_logits = jax.jit(cache_logits)


@method(
    family="heads",
    paper="arXiv:2207.09519",
    where="section 3.2",
    differs="Tip-Adapter with trained keys",
    claim="few_shot: a trained cache above an untrained one and a linear probe",
)
@searches(refine={"alpha": ALPHAS, "beta": BETAS})
def tip_adapter_f(
    features: np.ndarray,
    labels: np.ndarray,
    text: np.ndarray,
    scale: float,
    *,
    alpha: float = 1.0,
    beta: float = 5.5,
    epochs: int = 20,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    seed: int = 0,
) -> TipAdapter:
    """Tip-Adapter-F (arXiv:2207.09519, section 3.2): trains the cache's keys, which start as the training features.

    The optimizer is AdamW with a cosine schedule to 0, the loss the mean cross-entropy. The weight decay is torch's
    default, as in the authors' code. The authors' code trains on augmented pictures, drawn anew each epoch, and keeps
    the epoch that is best on test; this function trains on the cached features alone.

    Args:
      epochs: 0 gives Tip-Adapter.
      batch_size: the last batch of an epoch may be smaller.
      seed: of the order of examples.
      others: see `heads`; alpha and beta as in `TipAdapter`.
    """
    head = tip_adapter(features, labels, text, scale, alpha=alpha, beta=beta)
    rows = shuffled(len(head.keys), batch_size, epochs, seed)
    if not len(rows):
        return head
    data = (head.keys, head.labels, head.text, scale, alpha, beta, learning_rate, weight_decay)
    keys, losses = _train_keys(rows, *data)
    return head._replace(keys=finite(keys, losses))


@jax.jit
def _train_keys(rows, features, labels, text, scale, alpha, beta, learning_rate, weight_decay):
    values = jax.nn.one_hot(labels, len(text))
    optimizer = optax.adamw(optax.cosine_decay_schedule(learning_rate, len(rows)), eps=EPS, weight_decay=weight_decay)

    def loss(keys, rows):
        x = features[rows]
        logits = alpha * cache_logits(x, keys, values, beta) + scale * matmul(x, text.T)
        return cross_entropy(logits, labels[rows], rows >= 0)

    return descend(loss, features, optimizer, rows)
