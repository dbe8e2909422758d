"""Selections: parts of a batch that terms train on, chosen by the model.

objective=dict(
    terms=dict(contrastive=dict(on="learnable")),
    selections=dict(learnable=dict(name="learnability", share=0.2)),
    teachers=dict(reference=dict(spec="runs/reference")),
)
"""

from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.objectives.term import WHERE, Row, Selection


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
        reference = outputs.teacher(teacher)
        found = {}
        for name, one in (("learner", outputs), ("reference", reference)):
            count = len(one["image_embedding"])
            scalar = lambda value, count=count: jnp.broadcast_to(jnp.asarray(0.0 if value is None else value), (count,))
            found[name] = {
                "image": one["image_embedding"],
                "text": one["text_embedding"],
                "scale": scalar(one["scale"]),
                "bias": scalar(one["bias"]),
            }
        return found

    def select(features, rows, ctx):
        learnable = _losses(features["learner"]) - _losses(features["reference"])  # [n, n], of every pair
        size = len(learnable)
        wanted = max(1, round(share * size))
        rounds = min(chunks, wanted)
        sizes = [wanted // rounds + (i < wanted % rounds) for i in range(rounds)]
        own, both = jnp.diag(learnable), learnable + learnable.T
        chosen, drawn = jnp.zeros(size, bool), []
        for rng, count in zip(jax.random.split(ctx.rng, rounds), sizes, strict=True):
            gain = own + jnp.sum(jnp.where(chosen, both, 0), axis=1)
            noisy = jnp.where(chosen, -jnp.inf, gain + jax.random.gumbel(rng, (size,), gain.dtype))
            index = jax.lax.top_k(noisy, count)[1]  # draws without replacement
            chosen, drawn = chosen.at[index].set(True), [*drawn, index]
        return {key: Row(key, jnp.concatenate(drawn)) for key in rows}

    return Selection("learnable", seen, select, groups=groups)


def _losses(pairs):
    """Returns the sigmoid loss of every pair, [n, n]."""
    logits = pairs["scale"][:, None] * pairs["image"] @ pairs["text"].T + pairs["bias"][:, None]
    matches = jnp.eye(len(logits), dtype=bool)
    return -jax.nn.log_sigmoid(jnp.where(matches, logits, -logits))
