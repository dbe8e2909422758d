"""Chooses the examples that are shown, and the examples that are trained on."""

import numpy as np


def evenly_spaced(length: int, count: int) -> np.ndarray:
    """At most `count` of range(length), evenly spaced from the first to the last: a choice by rule, not by looks."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(np.int64))


def few_shots(labels: np.ndarray, shots: int | None, seed: int) -> np.ndarray:
    """Draws `shots` examples of each class; returns their places, in order.

    A smaller class gives all its examples.

    Args:
      labels: int [N]; a negative label is no class.
      shots: examples of each class; None for all.
      seed: the draw of a class depends on the seed, the class, and the class's number of examples.
    """
    chosen = []
    for c in np.unique(labels[labels >= 0]):
        own = np.flatnonzero(labels == c)
        chosen.append(own if shots is None else np.random.default_rng((seed, int(c))).permutation(own)[:shots])
    return np.sort(np.concatenate(chosen))
