"""Pictures seen by a text: patches that a text pools, and terms on such pictures."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax import config
from vlm_jax.catalogue import method
from vlm_jax.config import choose
from vlm_jax.errors import UserError
from vlm_jax.models.layers import Attention, KeyValues, Norm
from vlm_jax.models.token_loss import in_chunks
from vlm_jax.models.two_tower import unit
from vlm_jax.objectives.contrastive.texts import compared, mean, texts_of
from vlm_jax.objectives.outputs import Outputs
from vlm_jax.objectives.term import WHERE, Term
from vlm_jax.params.sharding import split_batch


class TextPool(nn.Module):
    """Attention pooling of patches by texts: softmax over the patches and a zero, which a text finds that sees nothing.

    FLAIR (arXiv:2412.03561): norms of queries and of keys, no residual, no MLP.

    Attributes:
      heads: attention heads; None: 8, or the largest power of two below that divides the width.
    """

    heads: int | None = None

    @nn.compact
    def __call__(self, texts, patches, real):
        """[B, M, D], [B, N, D], bool [B, N] -> [B, M, D]."""
        norm = lambda name, x: Norm(dtype=x.dtype.name, eps=1e-5, name=name)(x)
        width = texts.shape[-1]
        heads = math.gcd(8, width) if self.heads is None else self.heads
        if width % heads:
            raise UserError(f"{WHERE}.pool: {heads} heads do not divide embeddings of {width}; set heads")
        nothing = jnp.zeros((1, heads, width // heads), texts.dtype)
        attention = Attention(heads, dtype=texts.dtype.name, name="attn")
        query, context = norm("query_norm", texts), norm("norm", patches)
        return attention(query, context, real[:, None, None], prefix=KeyValues(nothing, nothing))[0]


def attention(*, heads: int | None = None) -> Callable:
    """Returns `TextPool` of the term's own."""
    return lambda outputs, *args: outputs.part("pool", TextPool(heads), *args)


def sparse(*, threshold: float | None = None) -> Callable:
    """Returns a pool without parameters: sum_n a_n v_n (SPARC, arXiv:2401.09865).

    a is the similarity of the text and the patches, scaled to 0 to 1 over the picture's patches, 0 below the threshold,
    and divided by its sum. The threshold is 1 / N by default, N patches; with 1, the text sees its best patch alone.
    """
    if threshold is not None and not 0 <= threshold <= 1:
        raise UserError(f"{WHERE}.pool.threshold is {threshold}; expected 0 to 1, or None for 1 / number of patches")

    def pool(outputs, texts, patches, real):
        weights = grouped(jnp.einsum("bmd,bnd->bmn", texts, patches, precision="highest"), real[:, None], threshold)
        return jnp.einsum("bmn,bnd->bmd", weights, patches, precision="highest")

    return pool


POOLS = {"attention": attention, "sparse": sparse}
"""Name -> options -> pool(outputs, texts [B, M, D], patches [B, N, D], which are real bool [B, N]) -> [B, M, D]."""


def grouped(similarity: jax.Array, real: jax.Array, threshold: float | None = None) -> jax.Array:
    """Returns weights [..., N] that sum to 1, of similarities [..., N] of which `real` ones count, see `sparse`."""
    count = jnp.maximum(jnp.sum(real, axis=-1, keepdims=True), 1)
    low = jnp.min(similarity, axis=-1, keepdims=True, where=real, initial=jnp.inf)
    high = jnp.max(similarity, axis=-1, keepdims=True, where=real, initial=-jnp.inf)
    flat = high <= low  # one patch, or patches that are all alike
    scaled = jnp.where(flat, 1.0, (similarity - low) / jnp.where(flat, 1.0, high - low))
    kept = real & (scaled >= (1 / count if threshold is None else threshold))
    scaled = jnp.where(kept, scaled, 0)
    return scaled / jnp.maximum(jnp.sum(scaled, axis=-1, keepdims=True), 1e-12)


def _pool(spec: str | Mapping[str, Any]) -> Callable:
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    build = choose(POOLS, options.pop("name", None), f"{WHERE}.pool")
    return config.call(build, options, f"{WHERE}.pool")


def patches_of(outputs: Outputs) -> dict[str, jax.Array]:
    """Returns patches in the space of the texts: `patches` [B, N, D], zeros for padding, and `real`, bool [B, N]."""
    patches = outputs["patch_embeddings"]
    return {"patches": patches, "real": jnp.any(patches != 0, axis=-1)}


@method(
    family="terms",
    system="DreamLIP",
    paper="arXiv:2403.17007",
    differs="each of a picture's texts matches the patches that resemble it",
)
def grouping(
    *,
    model: Any,
    key: str = "texts",
    pool: str | Mapping[str, Any] = "sparse",
    among: str = "batch",
    scale: float | None = None,
    pad_id: int | None = None,
) -> Term:
    """The contrastive loss of texts t_ik and of picture i as they see it, g_ik (grouping loss, Zheng et al. 2024).

        g_ik = unit(sum_n a_ikn v_in),   logits: scale <g_ik, t_jl>

    v are the patches in the space of the texts, a the weights of `sparse`. The loss is half the sum of both directions'
    cross-entropies; each (i, k) matches itself alone. With one text a picture and one patch, this is `contrastive`. The
    term stands beside `several_texts`.

    Args:
      model: linen module with the output `patch_embeddings`.
      key: the texts, int [B, K, L] of the batch, see `texts_of`.
      pool: "sparse", dict(name="sparse", threshold=0.1), or "attention", see `POOLS`.
      among: "batch": all (j, l) are candidates, as the authors train; "picture": those of picture i, as SPARC trains,
        so that no text can be told by its picture.
      scale: the factor on cosines; defaults to the model's.
      pad_id: id of padding; the tokenizer's, which is the default.

    Metrics: `accuracy`, the share of g_ik whose nearest text is t_ik.
    """
    choose({"batch": 0, "picture": 0}, among, f"{WHERE}.among")
    pool = _pool(pool)

    def features(outputs, ctx):
        texts, seen = texts_of(outputs, ctx, key, pad_id), patches_of(outputs)
        groups = unit(pool(outputs, texts.embeddings, seen["patches"], seen["real"]), 1e-12)
        return {"groups": groups, "texts": texts}

    def loss(outputs, features, rows, ctx):
        groups, texts = features["groups"], features["texts"]
        factor, bias = outputs["scale"] if scale is None else scale, outputs["bias"]
        if among == "picture":
            losses, best = within(groups, texts.embeddings, texts.given, factor)
            return mean(losses, texts.given), {"accuracy": mean(best, texts.given)}
        y, given = texts.flat
        labels = jnp.arange(len(y))
        both = dict(labels=(labels, labels), masks=(given, given))
        value, accuracy = compared(groups.reshape(y.shape), y, factor, bias, **both)
        return value, {"accuracy": accuracy}

    return Term("grouping", features, loss)


def within(x: jax.Array, y: jax.Array, given: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns half the sum of both directions' cross-entropies [B, K], and whether y_k is the nearest to x_k.

    Args:
      x, y: [B, K, D], unit norm; candidates are those of the same row of the batch.
      given: bool [B, K], False for those that lack: no candidates, and no use of their own results.
      scale: the factor on cosines.
    """
    logits = scale * jnp.einsum("bkd,bld->bkl", x, y, precision="highest")
    logits = jnp.where(given[:, :, None] & given[:, None], logits, -1e30)
    own = jnp.diagonal(logits, axis1=1, axis2=2)
    losses = (jax.nn.logsumexp(logits, axis=1) + jax.nn.logsumexp(logits, axis=2)) / 2 - own
    return losses, jnp.argmax(logits, axis=2) == jnp.arange(x.shape[1])


@method(
    family="terms",
    system="FLAIR",
    paper="arXiv:2412.03561",
    differs="a picture is compared with a text as the text sees it: attention pooling with the text as the query",
)
def conditioned(
    *,
    model: Any,
    key: str = "texts",
    pool: str | Mapping[str, Any] = "attention",
    chunk: int = 64,
    pad_id: int | None = None,
) -> Term:
    """The text-conditioned sigmoid loss (Xiao et al. 2025): B times the mean over pairs of -log sigmoid(z x).

        x_ij = scale <unit(pool(t_j, patches of i)), t_j> + bias

    Picture i is compared with its own texts, z = 1, and with one drawn text of each other picture, z = -1. A text never
    meets a picture that another text pooled, so that no text can be told without the picture. The authors add half of
    this loss and half of the multi-positive loss, `several_texts` with among="all" and the sigmoid penalty. With one
    text for each picture, one patch and the pool "sparse", this is SigLIP's loss.

    Args:
      model: linen module with the output `patch_embeddings`.
      key: the texts, int [B, K, L] of the batch, see `texts_of`.
      pool: "attention", dict(name="attention", heads=8), or "sparse", see `POOLS`. The parameters of "attention" are
        the term's own.
      chunk: number of texts that see each picture at a time, which bounds memory.
      pad_id: id of padding; the tokenizer's, which is the default.

    Metrics: `positive` and `negative`, mean cosines of both kinds of pairs.
    """
    pool = _pool(pool)

    def features(outputs, ctx):
        return {**patches_of(outputs), "texts": texts_of(outputs, ctx, key, pad_id)}

    def loss(outputs, features, rows, ctx):
        texts, given = features["texts"]
        size, count = given.shape
        drawn = _drawn(given, ctx.rng if ctx.rng is not None else jax.random.key(0))  # [B, B]
        index = jnp.concatenate([jnp.arange(size * count).reshape(size, count), drawn], axis=1)
        counts = jnp.concatenate([given, jnp.any(given, axis=1) & ~jnp.eye(size, dtype=bool)], axis=1)
        flat, patches, real = texts.reshape(size * count, -1), split_batch(features["patches"]), features["real"]

        def some(index):
            query = split_batch(flat[index])
            seen = unit(pool(outputs, query, patches, real), 1e-12)
            return jnp.sum(seen * query, axis=-1)

        pool(outputs, flat[index[:, :1]], patches, real)  # makes its parameters outside of the loop over chunks
        cosines = in_chunks(some, (index,), chunk)
        logits = outputs["scale"] * cosines + (0.0 if outputs["bias"] is None else outputs["bias"])
        own = jnp.arange(count + size) < count
        losses = -jax.nn.log_sigmoid(jnp.where(own, logits, -logits))
        metrics = {"positive": mean(cosines, counts & own), "negative": mean(cosines, counts & ~own)}
        return size * mean(losses, counts), metrics

    return Term("conditioned", features, loss)


def _drawn(given: jax.Array, rng: jax.Array) -> jax.Array:
    """Returns the number, from 0 to B K - 1, of a text of row j for each row i, int [B, B]; of bool [B, K]."""
    size, count = given.shape
    choice = jax.random.categorical(rng, jnp.where(given, 0.0, -1e9), shape=(size, size))
    return choice + count * jnp.arange(size)
