"""Arrays with a row for each class that a recipe's terms read, made once by the base model (`Extended.tables`)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.data import class_lists
from vlm_jax.pretrained import Pretrained, prompts_of


class Known(NamedTuple):
    """What a table is made from.

    Attributes:
      base: the model before adaptation.
      images: labelled pictures, preprocessed [N, H, W, 3], or a list.
      labels: int [N].
      names: of the C classes.
      rows: of the set "classes", without the tables.
    """

    base: Pretrained
    images: Any
    labels: np.ndarray
    names: Sequence[str]
    rows: Mapping[str, Any] = {}

    @property
    def features(self) -> np.ndarray:
        """The base model's embeddings of the pictures, unit norm [N, D]."""
        embed = self.base.embed_images if isinstance(self.images, list) else self.base.embed_image_batch
        return embed(self.images)


def prototypes(known: Known) -> np.ndarray:
    """Returns the mean embedding of each class's pictures, float32 [C, D]; zeros for a class without pictures."""
    own = np.eye(len(known.names), dtype=np.float32)[known.labels]
    return own.T @ known.features / np.maximum(own.sum(0), 1)[:, None]


def described(templates: str | Sequence[str]) -> Callable[[Known], np.ndarray]:
    """A table of each name in each prompt, unit norm [C, T, D].

    Args:
      templates: prompts with `{}` for the name, or a list of prompts such as "imagenet80".
    """
    prompts = class_lists.read_templates(templates)
    embed = lambda known: known.base.embed_texts(prompts_of(known.names, prompts))
    return lambda known: embed(known).reshape(len(known.names), len(prompts), -1)


def ensembled(templates: str | Sequence[str]) -> Callable[[Known], np.ndarray]:
    """A table of the normalised mean of each name's prompts, unit norm [C, D]; arguments as for `described`."""
    several = described(templates)

    def mean(known):
        rows = several(known).mean(1)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    return mean
