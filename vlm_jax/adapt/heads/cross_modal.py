"""Linear classifiers that begin at the class names: trained on pictures and names, or on pictures alone.

Common arguments: see `heads`.
"""

import jax
import numpy as np
import optax

from vlm_jax.adapt.heads.checks import few_shot
from vlm_jax.adapt.heads.linear import zero_shot
from vlm_jax.adapt.heads.search import searches
from vlm_jax.adapt.heads.training import cross_entropy, descend, finite, matmul, shuffled
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.pretrained.linear import Linear

WARMUP = 50  # steps


@method(
    family="heads",
    system="CrossModal-FewShot",
    paper="arXiv:2301.06267",
    where="section 3",
    differs="class names are training examples beside the pictures",
    claim="few_shot: a cross-modal probe above a probe of pictures and zero-shot",
)
@searches({"learning_rate": [1e-3, 1e-4]})
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

    V [C, D] starts as `text`; the text embeddings are training examples of their classes, beside the pictures. Half of
    each batch are pictures, half texts. AdamW; the learning rate rises over 50 steps, then falls by a cosine. These
    settings and the defaults are of the authors' code. The authors' code also tries learning rates 1e-3 and 1e-4,
    weight decays 0, 1e-4 and 1e-2 and batches of 8 and 32, and keeps the step that is best on validation; this function
    keeps the last step.

    Args:
      steps: 0 gives `zero_shot`.
      batch_size: even; a half is at most as large as the number of pictures or texts, and the last half of an epoch, if
        short, is left out.
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


@method(
    family="heads",
    system="ConES",
    paper="arXiv:2305.18993",
    where="abstract",
    differs="the class embeddings themselves train, on pictures alone and without a text tower",
)
@searches({"learning_rate": [1e-3, 1e-4]})
def concept_embeddings(
    features: np.ndarray,
    labels: np.ndarray,
    text: np.ndarray,
    scale: float,
    *,
    steps: int = 1000,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> Linear:
    """Concept embedding search (ConES, Yi et al. 2023): logits s f V', where V [C, D] begins as `text` and trains.

    What a prompt's text would give is searched directly. Of the paper's tasks, this is naming; the optimizer is that of
    `cross_modal_probe`.

    Args:
      steps: 0 gives `zero_shot`.
      batch_size: the last batch of an epoch may be smaller.
      seed: of the order of examples.
      others: see `heads`.
    """
    features, labels, text = few_shot(features, labels, text)
    size = min(batch_size, len(features))
    rows = shuffled(len(features), size, -(-steps * size // len(features)), seed)[:steps]
    if not len(rows):
        return zero_shot(text, scale)
    weights, losses = _train_linear(rows, features, labels, text, scale, learning_rate, weight_decay)
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
        return cross_entropy(scale * matmul(features[rows], weights.T), labels[rows], rows >= 0)

    return descend(loss, text, optax.adamw(schedule, weight_decay=weight_decay), rows)
