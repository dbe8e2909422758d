"""The contrastive term: similarity x targets x negatives x penalty, over all pairs of the global batch.

The code works on global arrays: under `jit` with a batch sharded over devices, the examples of every device are
negatives for all other devices.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax import catalogue
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.kernels import contrastive as kernel
from vlm_jax.objectives.contrastive import targets as targets_of
from vlm_jax.objectives.contrastive.negatives import Candidates, Negatives
from vlm_jax.objectives.contrastive.penalty import HIDDEN, Pairs, Penalty
from vlm_jax.objectives.contrastive.similarity import Similarity
from vlm_jax.objectives.contrastive.targets import Targets
from vlm_jax.objectives.term import WHERE, Term

_BY_NAME = f"{WHERE}.mask and implementation need the kernels, which support no {{}}"


@method(
    family="terms",
    paper="arXiv:2103.00020",
    where="section 2.3",
    differs="pairs against all other pairs of the global batch: similarity x targets x negatives x penalty",
)
def contrastive(
    *,
    model: Any,
    penalty: str | Mapping[str, Any] = "softmax",
    similarity: str | Mapping[str, Any] = "cosine",
    targets: str | Mapping[str, Any] = "identity",
    negatives: str | Mapping[str, Any] = "in_batch",
    max_scale: float | None = None,
    mask: str | None = None,
    implementation: str | None = None,
) -> Term:
    """Returns the term of a model with two embeddings; logits are scale x similarity + bias.

    Args:
      model: linen module with the outputs `image_embedding`, `text_embedding`, `scale` and `bias`.
      penalty: "softmax", "sigmoid", "any_positive", "focal", "margin", or a dict with the name and options,
        `dict(name="softmax", label_smoothing=0.1)`.
      similarity: "cosine"; "token_wise" or "multiple_instance", for towers with pool "all"; "wasserstein", for a model
        with the space `gaussian`.
      targets: "identity", "null_image", a dict, or a batch key such as "concept": pictures and texts with equal values
        are positives.
      negatives: "in_batch", or more candidates: `dict(name="queue", size=65536)`, `dict(name="texts", key="texts")`,
        `dict(name="rewritten", positives="paraphrases")`.
      max_scale: upper limit of the scale (100 in CLIP, Section 2.5); gradients that lower the scale still pass.
      mask: a batch key, bool [B]; examples with False are no negatives, and loss and metrics ignore them.
      implementation: that of `kernels.contrastive`. None holds all logits of a small batch on one device, and otherwise
        one block of logits at a time, see `explain`.

    Metrics: `accuracy_image_to_text` (the share of images with a positive above every negative; of soft targets, with
    a text of the largest weight above all others), `accuracy_text_to_image`, `scale`, and `bias` if the model has one.
    """
    parts = Parts(
        catalogue.build("similarities", similarity, f"{WHERE}.similarity"),
        targets_of.build(targets, f"{WHERE}.targets"),
        catalogue.build("negatives", negatives, f"{WHERE}.negatives"),
        catalogue.build("penalties", penalty, f"{WHERE}.penalty"),
        mask,
        implementation,
    )
    if parts.by_name and (lacks := parts.lacks()):
        raise UserError(_BY_NAME.format(lacks))
    if parts.penalty.hard and parts.targets.labels is None:
        raise UserError(f"{WHERE}.penalty needs targets that match or do not, such as `identity`, not soft ones")
    if not parts.similarity.own and negatives != "in_batch":
        raise UserError(f"{WHERE}.negatives need a similarity of one vector each, such as `cosine`")

    def features(outputs, ctx):
        return {
            **parts.similarity.features(outputs),
            **parts.targets.features(outputs),
            **parts.negatives.features(outputs, ctx),
        }

    def loss(outputs, features, rows, ctx):
        scale, bias = outputs["scale"], outputs["bias"]
        if max_scale is not None:
            scale = at_most(scale, max_scale)
        metrics = {"scale": scale} | ({} if bias is None else {"bias": bias})
        candidates = None
        if parts.similarity.embeddings is not None:
            candidates = parts.negatives.candidates(features, ctx.state)
        if explain(parts, features, candidates).implementation == "plain":
            of_images, of_texts = _logits(parts, features, candidates, scale, bias)
            matches = _matches(parts, features, rows, candidates, of_images, of_texts)
            value = parts.penalty.plain(of_images, of_texts, *matches)
            best = [m >= jnp.max(m, axis, keepdims=True) for m, axis in zip(matches, (1, 0), strict=True)]
            accuracies = accuracy(of_images, best[0], axis=1), accuracy(of_texts, best[1], axis=0)
        else:
            pairs = _pairs(parts, features, candidates, rows, scale, bias)
            value, *results = parts.penalty.of_pairs(pairs)
            accuracies = [pairs.mean(result.best_positive > result.best_negative) for result in results]
        names = "accuracy_image_to_text", "accuracy_text_to_image"
        return value, metrics | dict(zip(names, accuracies, strict=True))

    return Term("contrastive", features, loss, init=parts.negatives.init, update=parts.negatives.update)


class Parts(NamedTuple):
    """The parts of a contrastive term, built."""

    similarity: Similarity
    targets: Targets
    negatives: Negatives
    penalty: Penalty
    mask: str | None = None
    implementation: str | None = None

    @property
    def by_name(self) -> bool:
        """Whether the kernels were asked for."""
        return self.mask is not None or self.implementation is not None

    def lacks(self, candidates: Candidates | None = None) -> str:
        """Returns what the kernels do not support, "" if they support all."""
        if self.similarity.embeddings is None:
            return "similarity other than `cosine`"
        if self.targets.labels is None:
            return "soft targets"
        if self.penalty.of_pairs is None:
            return "penalty other than softmax and sigmoid"
        if candidates is not None and candidates.images is not None and self.penalty.one_matrix:
            return "sigmoid whose images and texts have candidates of their own"
        return ""


def explain(parts: Parts, features: Mapping[str, Any], candidates: Candidates | None) -> kernel.Choice:
    """Returns the form of the loss: "plain", which holds all logits, or an implementation of `kernels.contrastive`."""
    lacks = parts.lacks(candidates)
    if lacks and parts.by_name:
        raise UserError(_BY_NAME.format(lacks))
    if lacks:
        return kernel.Choice("plain", f"the kernels support no {lacks}")
    if not parts.by_name and jax.sharding.get_abstract_mesh().empty and jax.device_count() > 1:
        return kernel.Choice("plain", "several devices without a mesh (`jax.set_mesh`) together hold all logits")
    image, _ = parts.similarity.embeddings(features)
    choice = kernel.explain(image, candidates.texts, implementation=parts.implementation)
    if choice.implementation == "reference" and not parts.by_name:
        return kernel.Choice("plain", choice.reason)
    return choice


def _logits(parts, features, candidates, scale, bias):
    """Returns logits [B, M] of images with texts and [M', B] of images with texts."""
    scores = parts.similarity.scores(features)
    if candidates is not None and (len(candidates.texts) > len(features["text"]) or candidates.images is not None):
        of = lambda image, text: parts.similarity.scores({"image": image, "text": text})[0]
        images = candidates.images
        scores = of(features["image"], candidates.texts), scores[1] if images is None else of(images, features["text"])
    logits = [scale * one for one in scores]
    if bias is not None:
        logits = [one + bias for one in logits]
    if candidates is None:
        return logits
    hide = lambda logits, mask: logits if mask is None else jnp.where(mask, logits, HIDDEN)
    return hide(logits[0], candidates.text_mask), hide(logits[1].T, candidates.image_mask).T


def _matches(parts, features, rows, candidates, of_images, of_texts):
    """Returns the targets of `_logits`: further candidates match what their row's own one matches."""
    of_image, of_text = parts.targets.of(features, rows, of_images.shape[0])
    none = Candidates(None) if candidates is None else candidates

    def wider(matches, length, rows, counts):
        size = matches.shape[1]
        new = jnp.zeros((len(matches), length - size), matches.dtype)
        if rows is not None:
            new = jnp.where(rows < 0, new, jnp.asarray(matches)[:, rows])
            new = new if counts is None else jnp.where(counts[size:], new, 0)
        return jnp.concatenate([matches, new.astype(matches.dtype)], axis=1)

    return (
        wider(of_image, of_images.shape[1], none.text_rows, none.text_mask),
        wider(of_text.T, of_texts.shape[0], none.image_rows, none.image_mask).T,
    )


def _pairs(parts, features, candidates, rows, scale, bias):
    image, text = parts.similarity.embeddings(features)
    valid = None
    if parts.mask is not None:
        if parts.mask not in rows:
            raise UserError(f"{WHERE}.mask is `{parts.mask}`, which the batch lacks; it has: {', '.join(rows)}")
        valid = rows[parts.mask]
    dtype = jnp.promote_types(image.dtype, jnp.float32)

    def counted(candidates, mask):
        if valid is None or candidates is None:
            return mask
        own = jnp.pad(valid, (0, len(candidates) - len(valid)), constant_values=True)
        return own if mask is None else own & mask

    return Pairs(
        image,
        text,
        candidates.texts,
        candidates.images,
        scale.astype(dtype),
        None if bias is None else bias.astype(dtype),
        parts.targets.labels(rows, len(image)),
        parts.targets.differ and candidates.text_rows is None and candidates.image_rows is None,
        valid,
        counted(candidates.texts, candidates.text_mask),
        counted(candidates.images, candidates.image_mask),
        candidates.text_rows,
        candidates.image_rows,
        parts.implementation,
    )


def accuracy(logits: jax.Array, positives: jax.Array, axis: int) -> jax.Array:
    """Returns the share of rows (axis=1) or columns (axis=0) with a positive above every negative; a tie is a miss."""
    best = lambda where: jnp.max(logits, axis, initial=-jnp.inf, where=where)
    return jnp.mean(best(positives) > best(~positives))


@jax.custom_vjp
def at_most(x: jax.Array, ceiling: float) -> jax.Array:
    """Returns min(x, ceiling). At the ceiling, gradients that lower x still pass, so that x can come down again."""
    return jnp.minimum(x, ceiling)


at_most.defvjp(
    lambda x, ceiling: (jnp.minimum(x, ceiling), x < ceiling),
    lambda below, g: (jnp.where(below | (g > 0), g, 0), None),
)
