"""How well pictures fit texts of their own, by any model that compares pictures and texts.

Two towers score a text by its cosine with the picture. Captioners score a text by its log-likelihood, summed over
tokens; this includes the language's likelihood.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_jax.evaluators.one_pass import Batch
from vlm_jax.pretrained.similarity import similarity_of_pairs


def of_lists(pretrained: Any, batch: Batch, lists: Sequence[Sequence[str]]) -> list[np.ndarray]:
    """Returns the scores of each picture that counts with the texts of its own list, float [len(lists[i])] each.

    All rows of a batch are scored in place, so that equal texts tie; a row without an n-th text is scored with another
    text.
    """
    most = max(map(len, lists))
    nth = lambda n: batch.spread([own[n] if n < len(own) else own[0] for own in lists], lists[0][0])
    scores = np.stack(of_columns(pretrained, batch.inputs, [nth(n) for n in range(most)]), axis=1)[batch.kept]
    return [row[: len(own)] for row, own in zip(scores, lists, strict=True)]


def of_columns(pretrained: Any, images: Any, columns: Sequence[Sequence[str]]) -> list[np.ndarray]:
    """Returns the scores of picture i of [B, ...] with text i of each column, float [B] each."""
    if getattr(pretrained, "is_captioner", False):
        return [pretrained.score_batch(images, texts)[0] for texts in columns]
    embedded = pretrained.embed_image_batch(images)
    return [similarity_of_pairs(embedded, pretrained.embed_texts(texts)) for texts in columns]
