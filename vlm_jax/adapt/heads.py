"""Few-shot classifiers on frozen, cached, unit-norm features of a two-tower model; no gradient through the towers.

    zero_shot            the class names alone
    gda, gaussian        Gaussians with one covariance, with the class names or alone
    tip_adapter, tip_x   a cache of training features
    linear_probe         logistic regression
    tip_adapter_f        the cache, trained
    cross_modal_probe    a linear classifier, trained on pictures and class names
    prolip               the image tower's last projection, trained
    reco                 embeddings refined by what a memory of pairs holds near them, trained on pairs

Each but the last returns a head: features [M, D] -> logits, float64 [M, C]. Their common arguments:

    features  float [N, D], unit norm: image embeddings of the training pictures
    labels    int [N], in range(C)
    text      float [C, D], unit norm: an embedding of each class's name, the zero-shot weights
    scale     the model's logit scale, s = exp(logit_scale), 100 in CLIP

`choose` picks hyper-parameters on validation features.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.adapt.heads_cache import TipAdapter, TipX, tip_adapter, tip_x
from vlm_jax.adapt.heads_linear import check_labels, gaussian, gda, zero_shot
from vlm_jax.adapt.heads_retrieval import Reco, reco
from vlm_jax.adapt.heads_trained import Projected, cross_modal_probe, prolip, tip_adapter_f
from vlm_jax.errors import DivergedError, UserError
from vlm_jax.pretrained.linear import Linear
from vlm_jax.pretrained.linear import logistic_regression as linear_probe

__all__ = [
    "Choice",
    "Linear",
    "Projected",
    "Reco",
    "TipAdapter",
    "TipX",
    "choose",
    "cross_modal_probe",
    "gaussian",
    "gda",
    "linear_probe",
    "prolip",
    "reco",
    "tip_adapter",
    "tip_adapter_f",
    "tip_x",
    "zero_shot",
]


class Choice(NamedTuple):
    """The best point of a grid.

    Attributes:
      parameters: name -> value.
      accuracy: top-1 on the validation features, in [0, 1].
      head: what was built of the parameters.
    """

    parameters: dict[str, Any]
    accuracy: float
    head: Callable[[np.ndarray], np.ndarray]


def choose(
    build: Callable[..., Callable[[np.ndarray], np.ndarray]],
    grid: Mapping[str, Sequence],
    features: np.ndarray,
    labels: np.ndarray,
) -> Choice:
    """The head that names most validation pictures right, of every combination of a grid's values; the first of equals.

    One whose training diverges is passed over, unless all do.

        choose(functools.partial(gda, *train, text, 100.0), {"alpha": [0.1, 1, 10]}, *validation)
        choose(head._replace, {"alpha": alphas, "beta": betas}, *validation)  # of a head already trained

    Args:
      build: hyper-parameters by name -> head.
      grid: name -> values to try.
      features: float [V, D], what heads take: validation pictures, neither of the training set nor of the test set.
      labels: int [V].
    """
    features, labels = np.asarray(features), np.asarray(labels)
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    if not points:
        raise UserError(f"nothing to choose from: {dict(grid)}; each hyper-parameter needs a value at least")
    best = None
    for point in points:
        try:
            head = build(**point)
        except DivergedError as error:
            failed = error
            continue
        logits = np.asarray(head(features))
        check_labels(labels, len(logits), logits.shape[1])
        accuracy = float(np.mean(logits.argmax(1) == labels))
        if best is None or accuracy > best.accuracy:
            best = Choice(point, accuracy, head)
    if best is None:
        raise failed
    return best
