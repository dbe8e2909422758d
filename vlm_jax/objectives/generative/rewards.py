"""Rewards: terms on texts that the model samples itself."""

from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.models.generate import Special, sample
from vlm_jax.models.token_loss import token_loss
from vlm_jax.models.vocabulary import is_text
from vlm_jax.objectives.outputs import Outputs, of_model
from vlm_jax.objectives.term import WHERE, Objective, Row, Selection, Term


def captions(outputs: Outputs, count: int, length: int, special: Special) -> jax.Array:
    """Returns `count` captions of each picture, sampled from the model without a gradient, int [B, count, length]."""
    params = jax.lax.stop_gradient(of_model(outputs.params))
    keys = jax.vmap(lambda key: jax.random.split(key, count))(outputs.keys)
    draw = lambda own: sample(outputs.model, params, outputs["image"], rng=own, length=length, special=special)
    return jnp.stack([draw(keys[:, j]).token_ids for j in range(count)], axis=1)


def rewarded(token_ids: jax.Array, rewards: jax.Array) -> dict[str, jax.Array | Row]:
    """Returns rows for `policy_gradient`, one for each of a picture's captions.

    A caption's advantage is its reward minus the mean reward of the picture's other captions.

    Args:
      token_ids: int [B, n, L], n captions of each picture, 2 or more.
      rewards: [B, n].
    """
    count, n = rewards.shape
    others = (jnp.sum(rewards, axis=1, keepdims=True) - rewards) / (n - 1)
    image = Row("image", jnp.repeat(jnp.arange(count), n))
    flat = {"token_ids": token_ids.reshape(count * n, -1), "reward": rewards.ravel()}
    return flat | {"image": image, "advantage": (rewards - others).ravel()}


def policy_gradient(name: str, on: str, pad_id: int | None = None, end_id: int | None = None) -> Term:
    """Returns the term -mean(advantage x log p(caption | picture)) (REINFORCE) on the rows of `rewarded`.

    Metrics: `reward`, and `spread`, the standard deviation of the advantages.
    """

    def features(outputs, ctx):
        hidden, targets = outputs["next_token"]
        log_p = token_loss(lambda hidden: outputs.apply("logits", hidden), hidden, targets).log_likelihood
        return jnp.sum(log_p, axis=1, where=is_text(targets, *ctx.special(pad_id, end_id)))

    def loss(outputs, features, rows, ctx):
        advantage = rows["advantage"]
        return -jnp.mean(advantage * features), {"reward": jnp.mean(rows["reward"]), "spread": jnp.std(advantage)}

    return Term(name, features, loss, on=on)


@method(
    family="terms",
    paper="arXiv:2409.03025",
    differs="captions are sampled, and rewarded if a judge finds their picture by them",
    needs={"model.name": "captioner", "objective.teachers": {"judge": {"spec": "two_tower"}}},
)
def self_retrieval(
    *,
    model: Any,
    judge: str = "judge",
    samples: int = 2,
    end_id: int | None = None,
    pad_id: int | None = None,
    judged_end: bool = False,
) -> Objective:
    """Policy gradient of the self-retrieval reward (Gaur et al. 2024), on captions that the model samples.

    A caption's reward is the log-probability of its own picture among the batch's, by the judge's scale x cosine.

    Args:
      model: a captioner.
      judge: name of a teacher with two embeddings and the captioner's token ids, e.g. `dict(spec="runs/clip")`.
      samples: captions of a picture, 2 or more.
      end_id, pad_id: of the tokenizer, which are the default; without one, 1 and 0.
      judged_end: whether the judge's texts keep the end token; otherwise padding stands in its place.

    Metrics: see `policy_gradient`.
    """
    if samples < 2:
        raise UserError(
            f"{WHERE}: self_retrieval compares captions of one picture; samples is {samples}, expected >= 2"
        )

    def draw(outputs, ctx):
        pad, end = ctx.special(pad_id, end_id)
        end = 1 if ctx.tokenizer is None and end is None else pad if end is None else end
        special = Special(start=model.decoder.start_id, end=end, pad=pad)
        ids, taught = captions(outputs, samples, model.decoder.length, special), outputs.teacher(judge)
        read = ids if judged_end else jnp.where(ids == end, pad, ids)
        text = [taught.apply("__call__", None, read[:, j]).text for j in range(samples)]
        return {"ids": ids, "text": jnp.stack(text, 1), "image": taught["scale"] * taught["image_embedding"]}

    def reward(features, rows, ctx):
        logits = jnp.einsum("ikd,jd->ikj", features["text"], features["image"])
        return rewarded(features["ids"], jnp.diagonal(jax.nn.log_softmax(logits), axis1=0, axis2=2).T)

    term = policy_gradient("self_retrieval", "samples", pad_id, end_id)
    return Objective((term,), (Selection("samples", draw, reward),))
