"""Negatives: the texts and images that a batch's images and texts are compared with."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.objectives.contrastive.texts import texts_of
from vlm_jax.objectives.queue import Queue
from vlm_jax.objectives.term import WHERE


class Candidates(NamedTuple):
    """What images and texts are compared with; the first B of each are the batch's own, in order.

    Attributes:
      texts: for the images, [M, D].
      images: for the texts, [M', D]; None: the batch's images, so that one matrix of logits serves both directions.
      text_mask, image_mask: bool [M], [M'], candidates that count; None for all.
      text_rows, image_rows: int [M - B], [M' - B], the row of the batch that a further candidate belongs to, which its
        row's partners match as well; -1 for none. None: -1 for all.
    """

    texts: jax.Array
    images: jax.Array | None = None
    text_mask: jax.Array | None = None
    image_mask: jax.Array | None = None
    text_rows: jax.Array | None = None
    image_rows: jax.Array | None = None


class Negatives(NamedTuple):
    """Negatives besides the pairs of the batch.

    Attributes:
      features: (outputs, ctx) -> dict of arrays [B, ...], with other keys than "image" and "text".
      candidates: (features, state) -> `Candidates`; features has "image" and "text", [B, D], as well.
      init, update: of a memory, as for `Term`.
    """

    features: Callable
    candidates: Callable
    init: Callable | None = None
    update: Callable | None = None


@method(
    family="negatives", paper="arXiv:2103.00020", where="figure 3", differs="all other images and texts of the batch"
)
def in_batch() -> Negatives:
    """The batch alone."""
    return Negatives(lambda outputs, ctx: {}, lambda features, state: Candidates(features["text"]))


@method(
    family="negatives",
    paper="arXiv:2210.01936",
    where="section 4",
    differs="texts that are wrong by a word stand beside the batch's",
    needs={"objective.negatives.key": "texts"},
)
def texts(*, key: str = "texts", pad_id: int | None = None) -> Negatives:
    """More texts of the batch, `key` int [B, K, L]: wrong for every image, candidates for every image.

    For hard negatives: texts that are wrong by a word or by the order of words. Texts of padding alone do not count,
    nor those that bool [B, K] `<key>_mask` of the batch leaves out.
    """
    return rewritten(negatives=key, positives=None, pad_id=pad_id)


@method(
    family="negatives",
    paper="arXiv:1911.05722",
    where="section 3.2",
    differs="a queue of earlier batches' embeddings under a slow average of the model",
    needs={"objective.teachers": {"momentum": {"decay": 0.99}}},
)
def queue(*, size: int = 65_536, teacher: str | None = "momentum") -> Negatives:
    """The last `size` images and texts of earlier steps, as the teacher embedded them (MoCo).

    Images and texts are compared with the teacher's embeddings, also with those of the own pair. Without a teacher the
    model itself embeds the candidates. The queue is empty at first. `size` is rounded up to whole batches.
    """

    def features(outputs, ctx):
        given = outputs.teacher(teacher) if teacher else outputs
        found = {"key_image": given["image_embedding"], "key_text": given["text_embedding"]}
        return found if teacher is None else jax.lax.stop_gradient(found)

    def candidates(features, state):
        taught, own = (features[key].shape[-1] for key in ("key_text", "text"))
        if taught != own:
            raise UserError(f"{WHERE}.negatives: the teacher's embeddings have {taught} dimensions, the model's {own}")
        counts = jnp.concatenate([jnp.ones(len(features["key_text"]), bool), state["filled"]])
        with_queue = lambda key: jnp.concatenate([features[key], state[key]])
        return Candidates(with_queue("key_text"), with_queue("key_image"), counts, counts)

    memory = Queue(("key_image", "key_text"), size)
    return Negatives(features, candidates, memory.init, memory.update)


@method(
    family="negatives",
    system="UNIMO",
    paper="arXiv:2012.15409",
    differs="an image also matches rewritten texts, and a text also matches similar images; wrong texts are negatives",
)
def rewritten(
    *,
    positives: str | None = "paraphrases",
    negatives: str | None = "texts",
    images: str | None = None,
    pad_id: int | None = None,
) -> Negatives:
    """More texts and images of a row, some of which match it, and some match none (CMCL of UNIMO, Li et al. 2021).

    All of them are candidates for the whole batch. UNIMO's loss has the penalty `any_positive`. Without keys, the batch
    alone.

    Args:
      positives: a key of the batch, texts int [B, P, L] that say what the row's text says: rewritten, or retrieved.
      negatives: a key of the batch, texts int [B, K, L] that are wrong for every image.
      images: a key of the batch, images [B, R, H, W, 3] that the row's text describes, too: retrieved ones.
      pad_id: id of padding; the tokenizer's, which is the default. Texts that lack do not count, see `texts`.
    """
    kinds = {key: kind for key, kind in ((negatives, "wrong"), (positives, "right")) if key}

    def features(outputs, ctx):
        found = {kind: texts_of(outputs, ctx, key, pad_id) for key, kind in kinds.items()}
        if images:
            pictures = outputs[images]
            if pictures.ndim != 5:
                raise UserError(
                    f"{WHERE}.negatives: `{images}` has the shape {pictures.shape}; expected [B, R, h, w, 3]"
                )
            embedded = outputs.apply("__call__", pictures.reshape(-1, *pictures.shape[2:]), None).image
            found["images"] = embedded.reshape(*pictures.shape[:2], -1)
        return found

    def candidates(features, state):
        own = features["text"], jnp.ones(len(features["text"]), bool)
        more = [own, *(features[kind].flat for kind in kinds.values())]
        rows = [rows_of(features[kind].given.shape, kind == "right") for kind in kinds.values()]
        texts, counts = (jnp.concatenate(parts) for parts in zip(*more, strict=True))
        found = Candidates(texts, text_mask=counts, text_rows=jnp.concatenate(rows) if positives else None)
        if not images:
            return found
        others = features["images"]
        pictures = jnp.concatenate([features["image"], others.reshape(-1, others.shape[-1])])
        return found._replace(images=pictures, image_rows=rows_of(others.shape[:2], True))

    return Negatives(features, candidates)


def rows_of(shape: tuple[int, int], right: bool) -> jax.Array:
    """Returns the rows [B K] of K candidates a row; -1 for those that are not right for it."""
    size, count = shape
    return jnp.repeat(jnp.arange(size), count) if right else jnp.full(size * count, -1)
