"""An epinet beside a linear classifier, which says how uncertain predictions are. Common arguments: see `heads`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.special

from vlm_jax import config
from vlm_jax.adapt.heads.checks import few_shot
from vlm_jax.adapt.heads.search import searches
from vlm_jax.adapt.heads.training import cross_entropy, descend, finite, matmul, shuffled
from vlm_jax.catalogue import method


class Network(NamedTuple):
    """sigma(x, z) = g([x, z]) z: an MLP with two hidden layers, whose output [C, I] meets the index z.

    Attributes:
      first, first_bias: [D + I, H] and [H].
      second, second_bias: [H, H] and [H].
      last, last_bias: [H, C I] and [C I].
    """

    first: np.ndarray
    first_bias: np.ndarray
    second: np.ndarray
    second_bias: np.ndarray
    last: np.ndarray
    last_bias: np.ndarray

    def __call__(self, x, z):
        """[M, D], [I] -> [M, C]."""
        x = jnp.concatenate([x, jnp.broadcast_to(z, (len(x), len(z)))], axis=1)
        x = jax.nn.relu(matmul(x, self.first) + self.first_bias)
        x = jax.nn.relu(matmul(x, self.second) + self.second_bias)
        return matmul((matmul(x, self.last) + self.last_bias).reshape(len(x), -1, len(z)), z)


class Epinet(NamedTuple):
    """Logits f(x) + sigma_L(x, z) + prior sigma_P(x, z) of an index z; f(x) = s x V' + b.

    Attributes:
      weights, bias: s V' [D, C] and b [C], the base classifier.
      learned: sigma_L.
      fixed: sigma_P, which no training changes.
      prior: its scale.
      indices: z of the predictions, float [Z, I].
    """

    weights: np.ndarray
    bias: np.ndarray
    learned: Network
    fixed: Network
    prior: float
    indices: np.ndarray

    def logits(self, x, z):
        """Logits of one index: [M, D], [I] -> [M, C]. Features reach the epinet without gradient."""
        held = jax.lax.stop_gradient(x)
        prior = self.prior * jax.lax.stop_gradient(self.fixed(held, z))
        return matmul(x, self.weights) + self.bias + self.learned(held, z) + prior

    def samples(self, features: np.ndarray) -> np.ndarray:
        """Features [M, D] -> logits of every index, float64 [Z, M, C]."""
        return np.asarray(_samples(self, np.asarray(features, np.float32)), np.float64)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Features [M, D] -> the log of the mean probability over indices, float64 [M, C]."""
        log_p = scipy.special.log_softmax(self.samples(features), axis=2)
        return scipy.special.logsumexp(log_p, axis=0) - np.log(len(log_p))

    def uncertainty(self, features: np.ndarray) -> np.ndarray:
        """Features [M, D] -> the variance of the probabilities over indices, summed over classes, float64 [M]."""
        return scipy.special.softmax(self.samples(features), axis=2).var(0).sum(1)


@jax.jit
def _samples(head, features):
    return jax.vmap(head.logits, (None, 0))(features, head.indices)


@method(
    family="heads",
    system="Epinet",
    paper="arXiv:2211.01568",
    differs="a small network of features and a random index says how uncertain each prediction is",
)
@searches({"learning_rate": [1e-3, 1e-2]})
def epinet(
    features: np.ndarray,
    labels: np.ndarray,
    text: np.ndarray,
    scale: float,
    *,
    steps: int = 300,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    hidden: int = 50,
    index: int = 30,
    prior: float = 1.0,
    draws: int = 8,
    samples: int = 100,
    seed: int = 0,
) -> Epinet:
    """Epinet (Osband et al. 2022): f(x) + sigma(sg[x], z), trained by cross-entropy over indices z ~ N(0, I).

    The base classifier f begins at the class names. sigma is a learned network plus a fixed one, the prior, of the same
    form: where pictures train, the learned one undoes the prior's spread over z; elsewhere the spread stays. The
    learned one's last layer begins at 0. Sizes are of the authors' code.

    Args:
      steps: 0 with prior 0 gives `zero_shot`'s probabilities.
      batch_size: the last batch of an epoch may be smaller.
      hidden, index: widths of the hidden layers and of z.
      prior: scale of the fixed network.
      draws: indices of a training step.
      samples: indices of the predictions.
      seed: of the networks, the order of examples and the indices.
      others: see `heads`.
    """
    config.check_least(1, "epinet", hidden=hidden, index=index, draws=draws, samples=samples)
    config.check_least(0, "epinet", prior=prior)
    features, labels, text = few_shot(features, labels, text)
    rng = np.random.default_rng((seed, 7))
    fixed = _network(rng, features.shape[1], len(text), hidden, index)
    learned = _network(rng, features.shape[1], len(text), hidden, index)
    learned = learned._replace(last=np.zeros_like(learned.last))
    indices = rng.standard_normal((samples, index)).astype(np.float32)
    weights = np.ascontiguousarray(scale * text.T, np.float32)
    head = Epinet(weights, np.zeros(len(text), np.float32), learned, fixed, float(prior), indices)
    size = min(batch_size, len(features))
    rows = shuffled(len(features), size, -(-steps * size // len(features)), seed)[:steps]
    if not len(rows):
        return head
    drawn = rng.standard_normal((len(rows), draws, index)).astype(np.float32)
    data = features.astype(np.float32), labels, scale, learning_rate, weight_decay
    trained, losses = _train(head, (rows, drawn), *data)
    kept = jax.tree.map(lambda leaf: finite(leaf, losses), trained)
    return head._replace(weights=scale * kept[0], bias=kept[1], learned=kept[2])


@jax.jit
def _train(head, batches, features, labels, scale, learning_rate, weight_decay):
    def loss(trained, batch):
        rows, z = batch
        own = head._replace(weights=scale * trained[0], bias=trained[1], learned=trained[2])
        logits = jax.vmap(own.logits, (None, 0))(features[rows], z)
        return jnp.mean(jax.vmap(cross_entropy, (0, None, None))(logits, labels[rows], rows >= 0))

    optimizer = optax.adamw(optax.cosine_decay_schedule(learning_rate, len(batches[0])), weight_decay=weight_decay)
    return descend(loss, (head.weights / scale, head.bias, head.learned), optimizer, batches)


def _network(rng, width, classes, hidden, index):
    """A network with kernels of variance 1 / inputs, and biases of 0."""
    sizes = (width + index, hidden), (hidden, hidden), (hidden, classes * index)
    kernels = [(rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32) for shape in sizes]
    return Network(*(part for kernel in kernels for part in (kernel, np.zeros(kernel.shape[1], np.float32))))
