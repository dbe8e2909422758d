"""Similarities: scores of every image with every text of a batch, before scale and bias."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.objectives.term import WHERE


class Similarity(NamedTuple):
    """Scores of images with texts, before scale and bias.

    Attributes:
      features: `Outputs` -> the compared part: pytree, leading axis B.
      scores: features -> (scores image -> text, scores text -> image), each [B, B], images in rows, texts in columns.
      embeddings: features -> (images [B, D], texts [B, D]); the scores are their inner products. None if the scores are
        not inner products.
    """

    features: Callable
    scores: Callable
    embeddings: Callable | None = None


@method(
    family="similarities", paper="arXiv:2103.00020", where="figure 3", differs="the cosine of two global embeddings"
)
def cosine() -> Similarity:
    """Cosine similarity: z_i . z_j of unit-norm global embeddings."""

    def scores(features):
        image, text = features["image"], features["text"]
        dtype = jnp.promote_types(image.dtype, jnp.float32)
        cosines = jnp.matmul(image.astype(dtype), text.astype(dtype).T, precision=jax.lax.Precision.HIGHEST)
        return cosines, cosines

    return Similarity(vectors, scores, lambda features: (features["image"], features["text"]))


@method(
    family="similarities",
    system="FILIP",
    paper="arXiv:2111.07783",
    where="section 3.1",
    differs="every patch finds its best word and every word its best patch",
    claim="token_wise_similarity: FILIP names better than CLIP, and its words find their patches",
    needs={"model.image.pool": "all", "model.text.pool": "all"},
)
def token_wise(*, chunk: int = 64) -> Similarity:
    """Mean over tokens of the best match in the other modality (FILIP, arXiv:2111.07783, section 3.1).

        of images: mean_k max_r <v_ik, t_jr>        of texts: mean_r max_k <v_ik, t_jr>

    v_ik is patch k of image i, t_jr is word r of text j, from embeddings [B, N, D] and [B, L, D] of towers with pool
    "all". Zero vectors are padding and are ignored. `chunk` texts are compared at a time, which bounds memory.
    """

    def scores(features):
        images, texts = features["image"], features["text"]
        is_patch, is_token = (jnp.any(x != 0, axis=-1) for x in (images, texts))
        mean = lambda x, real: jnp.sum(x * real, axis=-1) / jnp.maximum(jnp.sum(real, axis=-1), 1)

        @jax.checkpoint
        def with_text(text):
            tokens, real = text
            products = jnp.einsum("bkd,rd->bkr", images, tokens, precision=jax.lax.Precision.HIGHEST)
            best_token = jnp.max(products, axis=2, where=real, initial=-1)
            best_patch = jnp.max(products, axis=1, where=is_patch[..., None], initial=-1)
            return mean(best_token, is_patch), mean(best_patch, real)

        of_images, of_texts = jax.lax.map(with_text, (texts, is_token), batch_size=chunk)
        return of_images.T, of_texts.T

    return Similarity(tokens, scores)


def vectors(outputs: Any) -> dict[str, jax.Array]:
    """Returns both towers' global embeddings: one vector for each image and text."""
    image, text = outputs["image_embedding"], outputs["text_embedding"]
    if image.ndim != 2 or text.ndim != 2:
        raise UserError(f'{WHERE}.similarity compares one vector each; give towers another pool than "all"')
    return {"image": image, "text": text}


def tokens(outputs: Any) -> dict[str, jax.Array]:
    """Returns both towers' token embeddings: one vector for each token."""
    image, text = outputs["image_embedding"], outputs["text_embedding"]
    if image.ndim != 3 or text.ndim != 3:
        raise UserError(f'{WHERE}.similarity compares tokens; give image and text pool "all"')
    return {"image": image, "text": text}
