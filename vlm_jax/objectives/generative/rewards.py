"""Rewards: terms on texts that the model samples itself."""

from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.models.generate import Special, sample
from vlm_jax.models.token_loss import token_loss
from vlm_jax.objectives.outputs import of_model
from vlm_jax.objectives.term import WHERE, Objective, Row, Selection, Term


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
    end_id: int = 1,
    pad_id: int = 0,
    judged_end: bool = False,
) -> Objective:
    """Policy gradient of the self-retrieval reward (REINFORCE; Gaur et al. 2024).

    `samples` captions of each picture are drawn from the model. A caption's reward is the log-probability of its own
    picture among the batch's, by softmax of the judge's scale x cosine. The advantage is the reward minus the mean
    reward of the picture's other captions. The loss is -mean(advantage x log p(caption | picture)).

    Args:
      model: a captioner.
      judge: name of a teacher with two embeddings and the captioner's token ids, e.g. `dict(spec="runs/clip")`.
      samples: captions of a picture, 2 or more.
      end_id, pad_id: of the tokenizer.
      judged_end: whether the judge's texts keep the end token; otherwise padding stands in its place.

    Metrics: `reward`, and `spread`, the standard deviation of the advantages.
    """
    if samples < 2:
        raise UserError(
            f"{WHERE}: self_retrieval compares captions of one picture; samples is {samples}, expected >= 2"
        )
    special = Special(start=model.decoder.start_id, end=end_id, pad=pad_id)

    def draw(outputs, ctx):
        taught = outputs.teacher(judge)
        params = jax.lax.stop_gradient(of_model(outputs.params))
        keys = jax.vmap(lambda key: jax.random.split(key, samples))(outputs.keys)
        found = {"ids": [], "text": []}
        for j in range(samples):
            ids = sample(
                model, params, outputs["image"], rng=keys[:, j], length=model.decoder.length, special=special
            ).token_ids
            read = ids if judged_end else jnp.where(ids == end_id, pad_id, ids)
            found["ids"].append(ids)
            found["text"].append(taught.apply("__call__", None, read).text)
        image, scale = taught["image_embedding"], taught["scale"]
        return {key: jnp.stack(each, 1) for key, each in found.items()} | {"image": scale * image}

    def reward(features, rows, ctx):
        logits = jnp.einsum("ikd,jd->ikj", features["text"], features["image"])
        rewards = jnp.diagonal(jax.nn.log_softmax(logits), axis1=0, axis2=2).T  # [B, samples]
        others = (jnp.sum(rewards, axis=1, keepdims=True) - rewards) / (samples - 1)
        flat = lambda x: x.reshape(-1, *x.shape[2:])
        return {
            "token_ids": flat(features["ids"]),
            "image": Row("image", jnp.repeat(jnp.arange(len(rewards)), samples)),
            "reward": flat(rewards),
            "advantage": flat(rewards - others),
        }

    def features(outputs, ctx):
        hidden, targets = outputs["next_token"]
        log_p = token_loss(lambda hidden: outputs.apply("logits", hidden), hidden, targets).log_likelihood
        return jnp.sum(jnp.where(targets == pad_id, 0.0, log_p), axis=1)

    def loss(outputs, features, rows, ctx):
        advantage = rows["advantage"]
        return -jnp.mean(advantage * features), {"reward": jnp.mean(rows["reward"]), "spread": jnp.std(advantage)}

    return Objective((Term("self_retrieval", features, loss, on="samples"),), (Selection("samples", draw, reward),))
