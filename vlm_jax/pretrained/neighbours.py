"""Classes by nearest neighbours, on the host in float64."""

from typing import NamedTuple

import numpy as np

from vlm_jax.pretrained.embedding import unit

TEMPERATURE = 0.07  # arXiv:1805.01978, section 3.4


class Neighbours(NamedTuple):
    """A weighted vote of the nearest neighbours by cosine (Wu et al. 2018, arXiv:1805.01978, section 3.4).

    score of a class = sum over the k nearest of exp(cosine / 0.07) [label = class]

    Attributes:
      features: of the known examples, float64 [N, D], unit norm.
      labels: int [N].
      classes: C.
      neighbours: k; of equal neighbours the first ones vote.
    """

    features: np.ndarray
    labels: np.ndarray
    classes: int
    neighbours: int

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Returns scores, float64 [B, C], of features [B, D]."""
        cosines = unit(np.asarray(features, np.float64)) @ self.features.T
        nearest = np.argsort(-cosines, axis=1, kind="stable")[:, : self.neighbours]
        scores = np.zeros((len(cosines), self.classes))
        votes = np.exp(np.take_along_axis(cosines, nearest, axis=1) / TEMPERATURE)
        np.add.at(scores, (np.arange(len(scores))[:, None], self.labels[nearest]), votes)
        return scores


def knn(features: np.ndarray, labels: np.ndarray, classes: int, neighbours: int) -> Neighbours:
    """Returns the classifier of known examples, float [N, D] with labels int [N]."""
    return Neighbours(unit(np.asarray(features, np.float64)), labels, classes, neighbours)
