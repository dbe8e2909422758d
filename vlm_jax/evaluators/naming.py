"""The logits of class names for batches of pictures."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vlm_jax.pretrained import class_embeddings
from vlm_jax.pretrained.similarity import similarity


def namer(pretrained: Any, names: Sequence[str], templates: Sequence[str]) -> tuple[Callable[[Any], np.ndarray], float]:
    """Returns a function from a batch's inputs to scores [B, C], and the factor that makes logits of them.

    Scores of two towers are cosines; of a captioner, a head or a model that compares pair by pair, logits.
    """
    head = getattr(pretrained, "head", None) is not None
    if head or getattr(pretrained, "compares_pairs", False):
        return lambda inputs: pretrained.class_logits(inputs, names, None if head else templates), 1.0
    text = class_embeddings(pretrained.embed_texts, names, templates)
    scale = math.exp(float(pretrained.params["logit_scale"]))
    return lambda inputs: similarity(pretrained.embed_image_batch(inputs), text), scale
