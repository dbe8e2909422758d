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
      own: whether the embeddings are the model's, with which more texts and queues can be compared.
    """

    features: Callable
    scores: Callable
    embeddings: Callable | None = None
    own: bool = False


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

    return Similarity(vectors, scores, lambda features: (features["image"], features["text"]), own=True)


@method(
    family="similarities",
    system="MAP-uncertainty",
    paper="arXiv:2210.05335",
    differs="the distance of two normal distributions",
    needs={"model.space": "gaussian"},
)
def wasserstein() -> Similarity:
    """-W^2 = -|m_i - n_j|^2 - |s_i - t_j|^2 of normal distributions with means m, n and standard deviations s, t (MAP).

    The model's space is `gaussian`; means have unit norm. The loss's scale and bias are the affine map of the
    distance. W^2 is that of arXiv:2210.05335's contrastive task (D-VLC). As inner products of vectors with two more
    dimensions, the scores run on the kernels. If all standard deviations are equal: -|m_i - n_j|^2, so that with half
    the scale the softmax is CLIP's.
    """

    def features(outputs):
        found = {}
        for side, z in vectors(outputs).items():
            parts = outputs[f"{side}_parts"] or {}
            if "sigma" not in parts:
                raise UserError(f"{WHERE}.similarity `wasserstein` needs normal distributions: model.space=gaussian")
            z = jnp.concatenate([z, parts["sigma"].astype(z.dtype)], axis=1)
            square = -jnp.sum(jnp.square(z), axis=1, keepdims=True)
            more = [square, jnp.ones_like(square)]
            found[side] = jnp.concatenate([2**0.5 * z, *(more if side == "image" else more[::-1])], axis=1)
        return found

    return cosine()._replace(features=features, own=False)


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
        def with_text(images, is_patch, words, is_word):
            products = products_of(images, words)
            best_word = jnp.max(products, axis=2, where=is_word, initial=-1)
            best_patch = jnp.max(products, axis=1, where=is_patch[..., None], initial=-1)
            return mean(best_word, is_patch), mean(best_patch, is_word)

        of_images, of_texts = text_by_text(features, with_text, chunk)
        return of_images.T, of_texts.T

    return Similarity(tokens, scores)


@method(
    family="similarities",
    system="MIL-scores",
    paper="arXiv:2212.05561",
    differs="a text's words score bags of patches: pooled scores, and scores of patches that resemble the best one",
    needs={"model.image.pool": "all", "model.text.pool": "all"},
)
def multiple_instance(
    *, pool: str = "lse", sharpness: float = 5.0, non_local: float = 1.0, chunk: int = 64
) -> Similarity:
    """Mean over words of a pool over patches, and of a non-local score (Wang et al. 2022, "LSE+NL").

        s_ij = mean_r [pool_k <v_ik, t_jr> + non_local <sum_k a_k v_ik, t_jr>],
        a = softmax_k(sharpness <v_ik, v_ic>),  c = argmax_k <v_ik, t_jr>

    The score depends on the set of patches, and not on their order. Embeddings are those of `token_wise`.

    Args:
      pool: of a word's products x_k with the N patches: "max", as FILIP's scores of texts; "mean"; "lse",
        log(1/N sum_k exp(b x_k)) / b; "attention", sum_k softmax(b x)_k x_k. b is `sharpness`: "lse" and "attention" go
        from the mean (b = 0) to the maximum (b to infinity).
      sharpness: b, at least 0.
      non_local: weight of the second score: the word is compared with patches that resemble its best patch, as in
        arXiv:2011.08939.
      chunk: number of texts that are compared at a time, which bounds memory.
    """
    if pool not in POOLS:
        raise UserError(f"{WHERE}.similarity.pool is `{pool}`; expected one of: {', '.join(POOLS)}")
    if sharpness < 0:
        raise UserError(f"{WHERE}.similarity.sharpness is {sharpness}; expected at least 0")

    def scores(features):
        def with_text(images, is_patch, words, is_word):
            products, real = products_of(images, words), is_patch[..., None]
            found = POOLS[pool](products, real, sharpness)
            if non_local:
                best = jnp.argmax(jnp.where(real, products, -jnp.inf), axis=1)  # [b, r]
                critical = jnp.take_along_axis(images, best[..., None], axis=1)
                alike = jnp.einsum("bkd,brd->bkr", images, critical, precision=jax.lax.Precision.HIGHEST)
                found += non_local * jnp.sum(attention(alike, real, sharpness) * products, axis=1)
            return mean(found, is_word)

        both = text_by_text(features, with_text, chunk).T
        return both, both

    return Similarity(tokens, scores)


def attention(scores: jax.Array, real: jax.Array, sharpness: float) -> jax.Array:
    """Returns softmax(sharpness x scores) over the patches, axis 1; 0 for padding."""
    return jax.nn.softmax(sharpness * scores, axis=1, where=real)


def _log_mean_exp(x, real, sharpness):
    if sharpness == 0:
        return mean(x, real, axis=1)
    count = jnp.maximum(jnp.sum(real, axis=1), 1)
    return (jax.nn.logsumexp(sharpness * x, axis=1, where=real) - jnp.log(count)) / sharpness


POOLS: dict[str, Callable] = {
    "max": lambda x, real, sharpness: jnp.max(x, axis=1, where=real, initial=-1),
    "mean": lambda x, real, sharpness: mean(x, real, axis=1),
    "lse": _log_mean_exp,
    "attention": lambda x, real, sharpness: jnp.sum(attention(x, real, sharpness) * x, axis=1),
}
"""(products [B, N, L], bool [B, N, 1], sharpness) -> [B, L]: a word's products with all patches of an image."""


def mean(x: jax.Array, real: jax.Array, axis: int = -1) -> jax.Array:
    """Returns the mean over what is real; 0 without any."""
    return jnp.sum(x * real, axis=axis) / jnp.maximum(jnp.sum(real, axis=axis), 1)


def products_of(images: jax.Array, words: jax.Array) -> jax.Array:
    """Returns the inner products [B, N, L] of patches [B, N, D] and one text's words [L, D]."""
    return jnp.einsum("bkd,rd->bkr", images, words, precision=jax.lax.Precision.HIGHEST)


def text_by_text(features: Any, with_text: Callable, chunk: int) -> Any:
    """Returns the results of `with_text` for each text, stacked: the texts are the leading axis.

    `with_text(images [B, N, D], is_patch [B, N], words [L, D], is_word [L])`; zero vectors are padding. `chunk` texts
    are compared at a time, and again in the backward pass.
    """
    images, texts = features["image"], features["text"]
    is_patch, is_word = (jnp.any(x != 0, axis=-1) for x in (images, texts))
    one = jax.checkpoint(lambda text: with_text(images, is_patch, *text))
    return jax.lax.map(one, (texts, is_word), batch_size=chunk)


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
