"""A few-shot task: labelled pictures, the classes to tell apart, and a model's accuracy."""

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.errors import UserError
from vlm_jax.evaluators import metrics
from vlm_jax.params.table import named_leaves
from vlm_jax.pretrained import Pretrained, class_embeddings


class Shots(NamedTuple):
    """Pictures with labels, or a pool without.

    Attributes:
      images: preprocessed, [N, H, W, 3], or None if no method needs pictures.
      features: their embeddings, unit norm, float [N, D].
      labels: int [N], in range(C); -1 without a label.
    """

    images: Any
    features: np.ndarray
    labels: np.ndarray


class Task(NamedTuple):
    """The classes to tell apart.

    Attributes:
      names: of the C classes.
      templates: prompts.
      text: embeddings of the classes, unit norm, float [C, D].
      scale: of the model's logits.
      seed: of all random draws.
      pool: pictures of the classes without labels, or None.
    """

    names: Sequence[str]
    templates: Sequence[str]
    text: np.ndarray
    scale: float
    seed: int
    pool: Shots | None = None

    def unlabelled(self, method: str) -> Shots:
        """Returns the pool; raises a UserError if there is none, or if it has labels."""
        if self.pool is None:
            raise UserError(f"{method} learns from pictures without labels; give a pool (--pool=64)")
        return check_unlabelled(self.pool, f"the pool of {method}")


def check_unlabelled(pool: Shots, what: str) -> Shots:
    """Returns the pool; raises a UserError if a picture has a label."""
    if known := int(np.sum(np.asarray(pool.labels) != -1)):
        raise UserError(f"{what} has {known} labels, which no method may see; give labels of -1")
    return pool


def accuracy(base: Pretrained, adapted: Pretrained, queries: Shots, names: Sequence[str]) -> float:
    """The share of pictures that an adapted model names right, the mean of `named_right`."""
    return float(np.mean(named_right(base, adapted, queries, names)))


def named_right(
    base: Pretrained,
    adapted: Pretrained,
    queries: Shots,
    names: Sequence[str],
    columns: Sequence[int] | slice = slice(None),
) -> np.ndarray:
    """Whether an adapted model names each picture right, float64 [N], see `right`.

    `columns`: the classes of a head that are `names`.
    """
    logits = logits_of(base, adapted, queries, names)
    return right(logits if adapted.head is None else logits[:, columns], queries)


def logits_of(base: Pretrained, adapted: Pretrained, queries: Shots, names: Sequence[str]) -> np.ndarray:
    """Returns an adapted model's logits of pictures, float [N, names]; a head's are of the classes it was trained on.

    Cached features are reused if the image tower is unchanged.
    """
    changed = _changed(base, adapted)
    if adapted.head is not None:
        return np.asarray(adapted.head(features_of(base, adapted, queries)))
    if adapted.compares_pairs or changes_tower(changed, "image"):
        return adapted.class_logits(queries.images, names)
    text, scale = class_embeddings(adapted.embed_texts, names, adapted.templates), adapted.params["logit_scale"]
    return math.exp(float(scale)) * features_of(base, adapted, queries).astype(np.float64) @ text.T


def features_of(base: Pretrained, adapted: Pretrained, queries: Shots) -> np.ndarray:
    """Returns an adapted model's embeddings of pictures, [N, D]; the cached ones if nothing changes embeddings."""
    changed = _changed(base, adapted)
    if changes_tower(changed, "image"):
        return adapted.embed_image_batch(queries.images)
    return adapted.embed_image_batch(queries.features) if changes_embeddings(changed) else queries.features


def right(logits: np.ndarray, queries: Shots) -> np.ndarray:
    """Whether each picture's largest logit is its label's, float64 [N]; of n equal largest ones, 1 / n."""
    return metrics.truth_ranks(logits, queries.labels).within(1)


def changes_tower(changed: Collection[str], tower: str) -> bool:
    """Returns whether a tower's own parameters, or those that both towers share, are among the changed ones."""
    return any(name.startswith((f"{tower}/", "trunk/", "space/")) for name in changed)


def changes_embeddings(changed: Collection[str]) -> bool:
    """Returns whether insertions after the towers, `insertions.after_towers`, are among the changed parameters."""
    return any(name.startswith("inserted_") for name in changed)


def _changed(base: Pretrained, adapted: Pretrained) -> list[str]:
    own = named_leaves(base.params)
    return [name for name, leaf in named_leaves(adapted.params).items() if own.get(name) is not leaf]
