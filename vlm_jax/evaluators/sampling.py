"""Which examples are shown, and which are trained on."""

import numpy as np


def evenly_spaced(length: int, count: int) -> np.ndarray:
    """At most `count` of range(length), from the first to the last: a choice by rule, not by looks."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(np.int64))


def few_shots(labels: np.ndarray, shots: int | None, seed: int) -> np.ndarray:
    """The places of `shots` examples of each class, in order, drawn by the seed; all of a class with fewer.

    Args:
      labels: int [N]; negative ones are no class.
      shots: how many; None for all.
      seed: the draw of a class depends on it, the class, and how many it has.
    """
    chosen = []
    for c in np.unique(labels[labels >= 0]):
        own = np.flatnonzero(labels == c)
        chosen.append(own if shots is None else np.random.default_rng((seed, int(c))).permutation(own)[:shots])
    return np.sort(np.concatenate(chosen))
