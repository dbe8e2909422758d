"""A few-shot task: labelled pictures, the classes to tell apart, and a model's accuracy."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

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


def accuracy(base: Pretrained, adapted: Pretrained, queries: Shots, names: Sequence[str]) -> float:
    """The share of pictures that an adapted model names right.

    Cached features are reused if the image tower is unchanged.
    """
    if adapted.head is not None:
        logits = adapted.head(queries.features)
    elif adapted.compares_pairs or _image_tower_changed(base, adapted):
        logits = adapted.class_logits(queries.images, names)
    else:
        text = class_embeddings(adapted.embed_texts, names, adapted.templates)
        logits = queries.features.astype(np.float64) @ text.T
    return share_right(logits, queries)


def share_right(logits: np.ndarray, queries: Shots) -> float:
    """The share of pictures whose largest logit is their label's."""
    return float(np.mean(np.argmax(logits, axis=1) == queries.labels))


def _image_tower_changed(base: Pretrained, adapted: Pretrained) -> bool:
    own = named_leaves(base.params)
    changed = (name for name, leaf in named_leaves(adapted.params).items() if own.get(name) is not leaf)
    return any(name.startswith("image/") for name in changed)
