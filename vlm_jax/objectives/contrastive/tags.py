"""Tags: a picture is classified among many short texts, whose embeddings are the classifier."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.kernels import contrastive as kernel
from vlm_jax.objectives.contrastive.texts import ids_of, mean, one_vector, texts_of
from vlm_jax.objectives.term import WHERE, Term


@method(
    family="terms",
    system="TagAlign",
    paper="arXiv:2312.14149",
    differs="a picture is classified by the tags of its caption, whose text embeddings are the classes",
)
def tags(
    *,
    model: Any,
    key: str = "tags",
    vocabulary: Sequence[str] = (),
    bos: bool = True,
    eos: bool = True,
    of: str = "image_embedding",
    scale: float | None = None,
    locked: bool = False,
    pad_id: int | None = None,
) -> Term:
    """Multi-tag classification (Liu et al. 2023), the mean over pictures with tags of

        -sum_c y_ic / |y_i| log softmax_c(scale <z_i, w_c>)

    w are text embeddings of the classes: the different tags of the batch, and the vocabulary. y_ic is 1 if picture i
    has tag c. With one tag a picture, all of them different, this is the half of `contrastive` from images to texts.
    The term stands beside `contrastive`; with model.image.pool="patches", z is the mean patch, as in the paper.

    Args:
      model: linen module with two embeddings.
      key: the tags, token ids int [B, K, L] of the batch, see `texts_of`; equal ids are one tag.
      vocabulary: texts of more classes. The run's tokenizer reads them with the length L of the batch's tags; the text
        tower embeds them at every step.
      bos, eos: of the vocabulary's texts, as in the op `tokenize` that makes the batch's tags.
      of: the output that is classified, [B, D].
      scale: the factor on cosines; defaults to the model's.
      locked: whether no gradient flows to the tags' embeddings, as in the paper.
      pad_id: id of padding; the tokenizer's, which is the default.

    Metrics: `found`, the mean probability of all of a picture's tags; `tags`, the mean number of a picture's tags;
    `classes`, the number of different tags.
    """

    def features(outputs, ctx):
        return {"image": one_vector(outputs[of], "image"), "tags": texts_of(outputs, ctx, key, pad_id)}

    def loss(outputs, features, rows, ctx):
        image, (_, given) = features["image"], features["tags"]
        ids = ids_of(key, rows[key])
        classes, counts = features["tags"].flat
        flat = ids.reshape(-1, ids.shape[-1])
        if vocabulary:
            more = token_ids_of(vocabulary, ctx.tokenizer, ids.shape[-1], bos, eos)
            embedded = one_vector(outputs.apply("__call__", None, more).text, "text")
            classes = jnp.concatenate([classes, embedded.astype(classes.dtype)])
            flat, counts = jnp.concatenate([flat, more]), jnp.concatenate([counts, jnp.ones(len(more), bool)])
        classes = jax.lax.stop_gradient(classes) if locked else classes
        numbers = first_equal(flat, counts)
        known = counts & (numbers == jnp.arange(len(numbers)))  # each different tag once
        own = numbers[: given.size].reshape(given.shape)
        earlier = jnp.tril(own[:, :, None] == own[:, None], -1) & given[:, None]
        has = given & ~jnp.any(earlier, axis=2)  # each tag of a picture once
        factor = jnp.asarray(outputs["scale"] if scale is None else scale, image.dtype)
        of_own = factor * jnp.einsum("bd,bkd->bk", image, classes[own], precision="highest")
        of_all, _ = kernel.pairwise_logsumexp(image, classes, factor, y_mask=known)
        tagged = jnp.any(given, axis=1)
        losses = of_all - jnp.sum(has * of_own, axis=1) / jnp.maximum(jnp.sum(has, axis=1), 1)
        found = jnp.sum(has * jnp.exp(of_own - of_all[:, None]), axis=1)
        metrics = {"found": mean(found, tagged), "tags": jnp.mean(jnp.sum(has, axis=1)), "classes": jnp.sum(known)}
        return mean(losses, tagged), metrics

    return Term("tags", features, loss)


def first_equal(ids: jax.Array, counts: jax.Array) -> jax.Array:
    """Returns the number of the first row of int [M, L] that is equal, int [M]; rows that count come before others."""
    order = jnp.lexsort((~counts, *ids.T[::-1]))  # by ids; among equal ones, those that count, in order
    ranked = ids[order]
    new = jnp.concatenate([jnp.ones(1, bool), jnp.any(ranked[1:] != ranked[:-1], axis=1)])
    begin = jax.lax.cummax(jnp.where(new, jnp.arange(len(ids)), 0))
    return jnp.zeros(len(ids), order.dtype).at[order].set(order[begin])


def token_ids_of(vocabulary: Sequence[str], tokenizer: Any, length: int, bos: bool, eos: bool) -> np.ndarray:
    """Returns the token ids [C, length] of a vocabulary.

    Raises:
      UserError: there is no tokenizer, a text is empty or given twice, or has no token that the tokenizer knows.
    """
    if tokenizer is None:
        raise UserError(f"{WHERE}.vocabulary needs the run's tokenizer; set config.tokenizer")
    seen: dict[tuple, str] = {}
    ids = tokenizer(list(vocabulary), length, bos=bos, eos=eos)
    for text, row in zip(vocabulary, map(tuple, ids.tolist()), strict=True):
        if not tokenizer.encode_text(text):
            raise UserError(f"{WHERE}.vocabulary: the tokenizer knows no word of the tag `{text}`; leave it out")
        if row in seen:
            raise UserError(f"{WHERE}.vocabulary: `{text}` has the tokens of `{seen[row]}`; leave one out")
        seen[row] = text
    return ids
