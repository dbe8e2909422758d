"""Selections: parts of a batch that terms train on, chosen by the model.

objective=dict(
    terms=dict(contrastive=dict(on="learnable")),
    selections=dict(learnable=dict(name="learnability", share=0.2)),
    teachers=dict(reference=dict(spec="runs/reference")),
)
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.objectives.contrastive import targets as targets_of
from vlm_jax.objectives.outputs import Outputs
from vlm_jax.objectives.term import WHERE, Feature, Row, Selection


@method(
    family="selections",
    paper="arXiv:2406.17711",
    where="section 3",
    differs="the rows of a super-batch that a reference has learned and the model has not",
    needs={"objective.teachers": {"reference": {"decay": 1.0}}},
)
def learnability(
    *, model: Any, share: float = 0.2, chunks: int = 16, teacher: str = "reference", groups: int = 1
) -> Selection:
    """Joint example selection (JEST, Evans et al. 2024): `share` of the batch, in chunks that are learnable together.

    The learnability of a set of rows is its loss under the model minus its loss under the reference, both the sigmoid
    loss over all pairs of the set. Rows are drawn in `chunks` rounds, without replacement: each by the softmax of the
    learnability that a row adds to the rows drawn before (the paper's algorithm 1).

    Args:
      model: linen module with two embeddings.
      share: rows chosen, by the rows of the batch.
      chunks: number of rounds.
      teacher: name of the reference.
      groups: see `Selection`.
    """
    if not 0 < share <= 1:
        raise UserError(f"{WHERE}.selections: share is {share}; expected a number above 0, up to 1")

    def seen(outputs, ctx):
        embeddings = lambda one: {"image": one["image_embedding"], "text": one["text_embedding"]}
        seen_by = lambda one: embeddings(one) | {name: per_row(one, name) for name in ("scale", "bias")}
        return {"learner": seen_by(outputs), "reference": seen_by(outputs.teacher(teacher))}

    def select(features, rows, ctx):
        learnable = _losses(features["learner"]) - _losses(features["reference"])  # [n, n], of every pair
        index = _drawn_jointly(learnable, max(1, round(share * len(learnable))), chunks, ctx.rng)
        return {key: Row(key, index) for key in rows}

    return Selection("learnable", seen, select, groups=groups)


def hard_pairs(*, model: Any, targets: str | Mapping[str, Any] = "identity", groups: int = 1) -> Selection:
    """Pairs to tell apart: each image with its text, each image with a wrong text, each text with a wrong image (3 B).

    ALBEF (arXiv:2107.07651, section 3.2). Wrong ones are drawn by the softmax of the similarity that the contrastive
    loss has. An image that all texts match has no wrong one: its pair counts as true (`match` is 1).

    Args:
      model: linen module with the outputs `image_embedding`, `image_tokens`, `image_mask` (None without padding),
        `text_embedding`, `text_tokens`, `scale`.
      targets: "identity", or labels as for `contrastive`; pairs that match are never drawn as wrong.
      groups: negatives are mined within so many equal parts of the batch; see `Selection`.
    """
    targets = targets_of.build(targets, f"{WHERE}.targets")
    if targets.labels is None:
        raise UserError(f"{WHERE}: hard pairs need targets that match or do not, such as `identity`, not soft ones")

    def seen(outputs, ctx):
        keys = ("image_embedding", "image_tokens", "text_embedding", "text_tokens")
        found = {key: outputs[key] for key in keys} | {"scale": per_row(outputs, "scale")}
        padded = {} if outputs["image_mask"] is None else {"image_mask": outputs["image_mask"]}
        return found | padded | targets.features(outputs)

    def select(features, rows, ctx):
        logits = features["scale"][:, None] * features["image_embedding"] @ features["text_embedding"].T
        of_images, of_texts = targets.of(features, rows, len(logits))
        of_text, of_image = jax.random.split(ctx.rng)
        hard = lambda rng, logits, matches: jax.random.categorical(rng, jnp.where(matches, -1e9, logits))
        i = jnp.arange(len(logits))
        images = jnp.concatenate([i, i, hard(of_image, logits.T, of_texts.T)])
        texts = jnp.concatenate([i, hard(of_text, logits, of_images), i])
        found = {key: Feature(key, images) for key in ("image_tokens", "image_mask") if key in features}
        found |= {"text_tokens": Feature("text_tokens", texts)}
        return found | {"token_ids": Row("token_ids", texts), "match": of_images[images, texts].astype(jnp.int32)}

    return Selection("pairs", seen, select, groups=groups)


def per_row(outputs: Outputs, name: str) -> jax.Array:
    """Returns a scalar output of the model, 0 if it has none, as a feature of each row, [n]."""
    value = outputs[name]
    return jnp.broadcast_to(jnp.asarray(0.0 if value is None else value), (len(outputs["image_embedding"]),))


def _drawn_jointly(scores: jax.Array, wanted: int, chunks: int, rng: jax.Array) -> jax.Array:
    """Returns `wanted` of n rows, int [wanted]: in rounds, by the softmax of what a row adds to the sum of scores."""
    rounds = min(chunks, wanted)
    sizes = [wanted // rounds + (i < wanted % rounds) for i in range(rounds)]
    own, both = jnp.diag(scores), scores + scores.T
    chosen, drawn = jnp.zeros(len(scores), bool), []
    for key, count in zip(jax.random.split(rng, rounds), sizes, strict=True):
        gain = own + jnp.sum(jnp.where(chosen, both, 0), axis=1)
        noisy = jnp.where(chosen, -jnp.inf, gain + jax.random.gumbel(key, gain.shape, gain.dtype))
        index = jax.lax.top_k(noisy, count)[1]  # draws without replacement
        chosen, drawn = chosen.at[index].set(True), [*drawn, index]
    return jnp.concatenate(drawn)


def _losses(pairs):
    """Returns the sigmoid loss of every pair, [n, n]."""
    logits = pairs["scale"][:, None] * pairs["image"] @ pairs["text"].T + pairs["bias"][:, None]
    matches = jnp.eye(len(logits), dtype=bool)
    return -jax.nn.log_sigmoid(jnp.where(matches, logits, -logits))
