"""Hyper-parameters of heads, chosen on validation features."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.adapt.heads.checks import check_labels
from vlm_jax.errors import DivergedError, UserError


def searches(*grids: Mapping[str, Sequence], refine: Mapping[str, Sequence] | None = None) -> Callable:
    """Decorates a head's function with the values to try for its options.

    Args:
      *grids: name -> values; grids are searched one after the other, each with the best values of earlier grids.
      refine: field -> values; fields of the trained head, tried by `_replace`.
    """

    def decorate(function):
        function.grids, function.refine = grids, refine or {}
        return function

    return decorate


class Choice(NamedTuple):
    """The best point of a grid.

    Attributes:
      parameters: name -> value.
      accuracy: top-1 on the validation features, in [0, 1].
      head: the head with these parameters.
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
    """Returns the head with the best validation accuracy over a grid; of equal heads the first.

    A combination of values whose training diverges is skipped, unless all diverge.

        choose(functools.partial(gda, *train, text, 100.0), {"alpha": [0.1, 1, 10]}, *validation)
        choose(head._replace, {"alpha": alphas, "beta": betas}, *validation)  # refines a trained head

    Args:
      build: hyper-parameters by name -> head.
      grid: name -> values to try.
      features: float [V, D], the heads' input: validation pictures, neither of the training set nor of the test set.
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
