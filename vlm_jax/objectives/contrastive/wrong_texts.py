"""A picture's own text against texts that are wrong by a word: each hard negative with its own picture alone."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.catalogue import method
from vlm_jax.config import choose
from vlm_jax.errors import UserError
from vlm_jax.models.two_tower import unit
from vlm_jax.models.vocabulary import is_text
from vlm_jax.objectives.contrastive.conditioned import grouped, patches_of
from vlm_jax.objectives.contrastive.texts import given_of, mean, one_vector, read, texts_of
from vlm_jax.objectives.outputs import Outputs
from vlm_jax.objectives.term import WHERE, Context, Term


@method(
    family="terms",
    system="FSC-CLIP",
    paper="arXiv:2410.05210",
    differs="a picture's own text against its hard negatives, also word by word; those told apart count less",
    needs={"objective.key": "texts"},
)
def wrong_texts(
    *,
    model: Any,
    key: str = "texts",
    scores: str = "global",
    gamma: float = 2.0,
    label_smoothing: float = 0.02,
    pad_id: int | None = None,
) -> Term:
    """Focal, smoothed cross-entropy over a picture's text, c = 0, and its wrong texts (FSC-CLIP, Oh et al. 2024).

        mean over i of sum_c y_c (1 - p_c)^gamma (-log p_c),   p = softmax over c of s_ic

    y_0 = 1 - e + e / C and y_c = e / C, where e is `label_smoothing`, and C counts the picture's texts. Scores:

        global   s_ic = scale <z_i, t_ic>
        local    s_ic = log sum_r exp(scale <v_icr, w_icr>),   v_icr = unit(sum_n a_icrn v_in)

    w are the words of a text and v the patches, in the space of both towers; a is <w, v> of a word, scaled to 0 to 1
    over the patches and divided by its sum; no gradient flows to a. Pictures without a wrong text do not count. The
    paper adds 0.5 of "global" and 0.2 of "local" to `contrastive`. With gamma and e 0, and all other texts of a batch
    as wrong texts, "global" is the half of CLIP's loss that goes from images to texts.

    Args:
      model: linen module with two embeddings; for "local" with `patch_embeddings` and `word_embeddings`.
      key: the wrong texts, int [B, K, L] of the batch, see `texts_of`; the op `hard_negatives` makes them.
      scores: "global" or "local".
      gamma: at least 0.
      label_smoothing: from 0 to below 1.
      pad_id: id of padding; the tokenizer's, which is the default.

    Metrics: `accuracy`, the share of pictures whose text is above all its wrong texts; `texts`, the mean number of
    wrong texts.
    """
    if gamma < 0 or not 0 <= label_smoothing < 1:
        raise UserError(
            f"{WHERE}: gamma is {gamma}, label_smoothing {label_smoothing}; expected >= 0, and 0 to below 1"
        )
    make, of = choose({"global": (_vectors, _global), "local": (_words, _local)}, scores, f"{WHERE}.scores")

    def loss(outputs, features, rows, ctx):
        logits, given = of(features, outputs["scale"])
        counts = jnp.concatenate([jnp.ones((len(given), 1), bool), given], axis=1)
        log_p = jnp.where(counts, jax.nn.log_softmax(logits, axis=1, where=counts), 0)
        smooth = label_smoothing / jnp.sum(counts, axis=1, keepdims=True)
        target = smooth + jnp.where(jnp.arange(counts.shape[1]) == 0, 1 - label_smoothing, 0)
        focus = jnp.maximum(-jnp.expm1(log_p), 1e-12) ** gamma if gamma else 1
        losses = -jnp.sum(jnp.where(counts, target * focus * log_p, 0), axis=1)
        return mean(losses, jnp.any(given, axis=1)), _metrics(logits, given)

    return Term("wrong_texts", lambda outputs, ctx: make(outputs, ctx, key, pad_id), loss)


@method(
    family="terms",
    system="Structure-CLIP",
    paper="arXiv:2305.06152",
    differs="a picture's own text lies above its semantic negatives by a margin",
    needs={"objective.key": "texts"},
)
def semantic_margin(*, model: Any, key: str = "texts", margin: float = 0.2, pad_id: int | None = None) -> Term:
    """Mean over pictures and their wrong texts c of max(0, margin + <z_i, t_ic> - <z_i, t_i>) (Huang et al. 2024).

    The paper's negatives exchange the subject and object of a relation, or the attributes of two things:
    `hard_negatives(1, kinds=('order',))`. The term stands beside `contrastive` or `knowledge`. With all other texts of
    a batch as wrong texts, it is the penalty `margin(hardest=False)` of images at the scale 1, by B - 1.

    Args:
      model: linen module with two embeddings.
      key: the wrong texts, see `wrong_texts`.
      margin: of cosines.
      pad_id: id of padding; the tokenizer's, which is the default.

    Metrics: as for `wrong_texts`.
    """

    def loss(outputs, features, rows, ctx):
        cosines, given = _global(features, 1.0)
        hinges = jnp.where(given, jnp.maximum(0, margin + cosines[:, 1:] - cosines[:, :1]), 0)
        hinges = jnp.sum(hinges, axis=1) / jnp.maximum(jnp.sum(given, axis=1), 1)
        return mean(hinges, jnp.any(given, axis=1)), _metrics(cosines, given)

    return Term("semantic_margin", lambda outputs, ctx: _vectors(outputs, ctx, key, pad_id), loss)


def _metrics(scores: jax.Array, given: jax.Array) -> dict[str, jax.Array]:
    above = scores[:, 0] > jnp.max(scores[:, 1:], axis=1, initial=-jnp.inf, where=given)
    texts = jnp.mean(jnp.sum(given, axis=1, dtype=scores.dtype))
    return {"accuracy": mean(above, jnp.any(given, axis=1)), "texts": texts}


def _vectors(outputs: Outputs, ctx: Context, key: str, pad_id: int | None) -> dict[str, Any]:
    image, text = (one_vector(outputs[f"{side}_embedding"], side) for side in ("image", "text"))
    wrong = texts_of(outputs, ctx, key, pad_id)
    return {"image": image, "texts": jnp.concatenate([text[:, None], wrong.embeddings], axis=1), "given": wrong.given}


def _global(features: Mapping[str, jax.Array], scale: Any) -> tuple[jax.Array, jax.Array]:
    """Returns (scores [B, 1 + K] of the own text and of wrong ones, bool [B, K], which are given)."""
    products = jnp.einsum("bd,bcd->bc", features["image"], features["texts"], precision="highest")
    return scale * products, features["given"]


def _words(outputs: Outputs, ctx: Context, key: str, pad_id: int | None) -> dict[str, Any]:
    """Returns the cosines of words with what they see, of the own text and of wrong ones [B, C, L], and masks."""
    seen = patches_of(outputs)
    ids = read(outputs, key)

    def encode(outputs):
        words = outputs.on(token_ids=ids.reshape(-1, ids.shape[-1]))["word_embeddings"]
        return words.reshape(*ids.shape, -1)

    own = outputs["token_ids"][:, None], outputs["word_embeddings"][:, None]
    wrong = ids, outputs.once(f"words of {key}", encode)
    found = [(_cosines(words, **seen), _is_word(some, ctx, pad_id)) for some, words in (own, wrong)]
    return {"own": found[0], "wrong": found[1], "given": given_of(outputs, ctx, key, pad_id)}


def _cosines(words: jax.Array, patches: jax.Array, real: jax.Array) -> jax.Array:
    """[B, C, L, D] and [B, N, D] -> [B, C, L]."""
    similarity = jnp.einsum("bcrd,bnd->bcrn", words, patches, precision="highest")
    weights = jax.lax.stop_gradient(grouped(similarity, real[:, None, None], 0.0))
    seen = unit(jnp.einsum("bcrn,bnd->bcrd", weights, patches, precision="highest"), 1e-12)
    return jnp.sum(seen * words, axis=-1)


def _is_word(ids: jax.Array, ctx: Context, pad_id: int | None) -> jax.Array:
    """Returns which tokens are words or the end, bool as ids; of a text without any all, so that scores are finite."""
    there = is_text(ids, *ctx.special(pad_id))
    if ctx.tokenizer is not None:
        there &= ids != ctx.tokenizer.bos_id
    return there | ~jnp.any(there, axis=-1, keepdims=True)


def _local(features: Mapping[str, Any], scale: Any) -> tuple[jax.Array, jax.Array]:
    """As `_global`."""
    of = lambda cosines, there: jax.nn.logsumexp(scale * cosines, axis=2, where=there)
    return jnp.concatenate([of(*features["own"]), of(*features["wrong"])], axis=1), features["given"]
