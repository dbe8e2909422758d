"""Few-shot heads whose weights are trained by gradient on cached features, each in one jitted scan over steps.

Common arguments: see `heads`. Training is in float32; the last step's weights are kept.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vlm_jax import config
from vlm_jax.adapt.heads_cache import TipAdapter, cache_logits, tip_adapter
from vlm_jax.adapt.heads_linear import check_labels, few_shot, unit, zero_shot
from vlm_jax.errors import DivergedError, UserError
from vlm_jax.pretrained.linear import Linear

EPS = 1e-4  # Adam's, in the code of Tip-Adapter and of ProLIP
WARMUP = 50  # steps of a cross-modal probe


def tip_adapter_f(
    features: np.ndarray,
    labels: np.ndarray,
    text: np.ndarray,
    scale: float,
    *,
    alpha: float,
    beta: float,
    epochs: int = 20,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    seed: int = 0,
) -> TipAdapter:
    """Tip-Adapter-F (arXiv:2207.09519, section 3.2): the cache's keys, first the training features, are trained.

    By AdamW with a cosine schedule to 0 on the mean cross-entropy; the weight decay is torch's default, which the
    authors' code leaves. That code trains on augmented pictures, drawn anew each epoch, and keeps the epoch that is
    best on test; this trains on the cached features, and looks at nothing else.

    Args:
      epochs: 0 gives Tip-Adapter.
      batch_size: the last batch of an epoch has what is left.
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
        logits = alpha * cache_logits(x, keys, values, beta) + scale * _matmul(x, text.T)
        return _cross_entropy(logits, labels[rows], rows >= 0)

    return descend(loss, features, optimizer, rows)


def cross_modal_probe(
    features: np.ndarray,
    labels: np.ndarray,
    text: np.ndarray,
    scale: float,
    *,
    steps: int = 12_800,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    seed: int = 0,
) -> Linear:
    """Cross-modal linear probing (arXiv:2301.06267, section 3): logits s f V', trained on pictures and class names.

    V [C, D] is first `text`; the text embeddings are training examples of their classes besides the pictures. Of each
    batch one half are pictures, the other texts. AdamW; the learning rate rises over 50 steps, then falls by a cosine.
    These and the defaults are of the authors' code, which tries learning rates 1e-3 and 1e-4, weight decays 0, 1e-4 and
    1e-2 and batches of 8 and 32, and keeps the step that is best on validation; this keeps the last.

    Args:
      steps: 0 gives `zero_shot`.
      batch_size: even; a half is no larger than what there is of its kind, and an epoch's last half, if short, is
        left out.
      seed: of the order of examples.
      others: see `heads`.
    """
    features, labels, text = few_shot(features, labels, text)
    if batch_size < 2 or batch_size % 2:
        raise UserError(f"batch_size is {batch_size}; expected an even number, half for pictures and half for texts")
    halves = []
    for kind, count in enumerate((len(features), len(text))):
        size = min(batch_size // 2, count)
        rows = shuffled(count, size, -(-steps // (count // size)), (seed, kind))
        whole = rows[(rows >= 0).all(1)][:steps]
        halves.append(whole + kind * len(features))
    rows = np.concatenate(halves, axis=1)
    if not len(rows):
        return zero_shot(text, scale)
    examples = np.concatenate([features, text]), np.concatenate([labels, np.arange(len(text))])
    weights, losses = _train_linear(rows, *examples, text, scale, learning_rate, weight_decay)
    return Linear(scale * finite(weights, losses).T, np.zeros(len(text)))


@jax.jit
def _train_linear(rows, features, labels, text, scale, learning_rate, weight_decay):
    schedule = optax.join_schedules(
        [
            optax.constant_schedule(1e-5),
            optax.linear_schedule(learning_rate / WARMUP, learning_rate, WARMUP - 1),
            optax.cosine_decay_schedule(learning_rate, len(rows)),
        ],
        [1, WARMUP],
    )

    def loss(weights, rows):
        return _cross_entropy(scale * _matmul(features[rows], weights.T), labels[rows])

    return descend(loss, text, optax.adamw(schedule, weight_decay=weight_decay), rows)


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


def prolip(
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
    """ProLIP (arXiv:2410.05270): the image tower's last projection K is trained, its bias b is not.

    Minimises the mean cross-entropy of s normalise(x K + b) W' plus lambda |K - K_0|_F^2 by Adam, all examples at each
    step, under a cosine schedule to 0. Defaults are of the authors' code. Adam's steps have about the size of the
    learning rate, however large lambda is: K stays that near K_0, not on it.

    Args:
      features: x, float [N, E], what the projection takes, or [A, N, E] for A augmented views, of which step i sees
        i mod A; the authors take as many as steps.
      labels: int [N].
      text: W, as in `heads`.
      scale: s.
      kernel: K_0, float [E, D].
      bias: b, float [D], or None.
      pull: lambda: a number, "1/N" or "1/N^2", N being the training pictures of a class, on average.
      steps: 0 gives the model's own, the zero-shot classifier.
      learning_rate: the first one; the paper goes from 1e-5 to 1e-2.
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
        x = _matmul(views[view], kernel) + bias
        x = x / jnp.linalg.norm(x, axis=1, keepdims=True)
        return _cross_entropy(scale * _matmul(x, text.T), labels) + pull * jnp.sum((kernel - start) ** 2)

    return descend(loss, start, optimizer, order)


_matmul = functools.partial(jnp.matmul, precision="highest")


def _cross_entropy(logits: jax.Array, labels: jax.Array, where: jax.Array | None = None) -> jax.Array:
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels), where=where)


def descend(loss: Callable, params: Any, optimizer: optax.GradientTransformation, batches: jax.Array) -> tuple:
    """Parameters after a step of the optimizer on `loss(params, batch)` for each batch, and the losses."""

    def step(carry, batch):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), batches)
    return params, losses


def shuffled(rows: int, size: int, epochs: int, seed: int | tuple[int, int]) -> np.ndarray:
    """Rows of the batches of some epochs, int [steps, size]; what an epoch's last batch lacks is -1."""
    if size < 1:
        raise UserError(f"batch_size is {size}; expected a number above 0")
    size = min(size, rows)
    rng, short = np.random.default_rng(seed), -rows % size
    order = [np.pad(rng.permutation(rows), (0, short), constant_values=-1) for _ in range(epochs)]
    return np.concatenate([np.empty(0, np.int64), *order]).reshape(-1, size)


def finite(trained: jax.Array, losses: jax.Array) -> np.ndarray:
    if not (jnp.isfinite(losses).all() and jnp.isfinite(trained).all()):
        raise DivergedError("the head's training has diverged (its loss is not finite); a smaller learning_rate?")
    return np.asarray(trained)
