"""Hashtags as classes: a picture predicts the tags that it has."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.objectives.contrastive.texts import mean
from vlm_jax.objectives.term import WHERE, Term


@method(
    family="terms",
    system="WSL-hashtags",
    paper="arXiv:1805.00932",
    differs="pictures predict their hashtags: softmax over a vocabulary, a target of 1/k for each of k tags",
    needs={"objective.key": "has", "objective.resample": 0.5},
)
def tag_softmax(
    *, model: Any, key: str = "tags", of: str = "image_pooled", resample: float = 0.0, rare: float = 1e-3
) -> Term:
    """Mean over pictures of -1/k sum over their k tags of log softmax(W z_i + b)_c (Mahajan et al. 2018).

    The head W, b belongs to the term. With one tag a picture, this is the cross-entropy of a classifier. The image
    tower then begins other runs: `model_init`, see configs/lit.py. Pictures without a tag do not count.

    `resample` p > 0 balances tags: a picture weighs max(1, max over its tags of (rare / f_c)^p), where f_c is the share
    of pictures seen so far with tag c, those of this batch among them. The mean over pictures is weighted; in
    expectation that is the gradient of drawing pictures so many times. 0.5 is the paper's square root.

    Args:
      model: linen module.
      key: the tags, bool [B, V] of the batch; the ops `tags` and `bag` make them.
      of: the output that is classified, [B, D].
      resample: p, at least 0.
      rare: share below which tags weigh more.

    Metrics: `accuracy`, the share of pictures whose best class is one of their tags; `tags`, the mean number of a
    picture's tags; with `resample`, `weight`, the largest of a picture.
    """
    if resample < 0 or not 0 < rare <= 1:
        raise UserError(f"{WHERE}: resample is {resample}, rare {rare}; expected at least 0, and above 0 to 1")

    def features(outputs, ctx):
        tags, z = outputs[key], outputs[of]
        if tags.ndim != 2:
            raise UserError(f"{WHERE}: `{key}` has shape {list(tags.shape)}; expected tags, bool [B, V]")
        head = nn.Dense(tags.shape[1], dtype=jnp.promote_types(z.dtype, jnp.float32), param_dtype=z.dtype)
        return {"logits": outputs.part("head", head, z), "tags": tags.astype(bool)}

    def loss(outputs, features, rows, ctx):
        logits, tags = features["logits"], features["tags"]
        number, any_tag = jnp.sum(tags, axis=1), jnp.any(tags, axis=1)
        own = jnp.sum(jnp.where(tags, logits, 0), axis=1) / jnp.maximum(number, 1)
        losses = jax.nn.logsumexp(logits, axis=1) - own
        best = jnp.take_along_axis(tags, jnp.argmax(logits, axis=1)[:, None], axis=1)[:, 0]
        metrics = {"accuracy": mean(best, any_tag), "tags": jnp.mean(number.astype(logits.dtype))}
        if not resample:
            return mean(losses, any_tag), metrics
        seen = update(ctx.state or init(features), features, ctx)
        share = seen["counts"].astype(logits.dtype) / jnp.maximum(seen["pictures"], 1)
        factor = jnp.maximum(1, (rare / jnp.maximum(share, 1e-12)) ** resample)
        weight = jnp.max(jnp.where(tags, factor, 0), axis=1)
        value = jnp.sum(weight * losses) / jnp.maximum(jnp.sum(weight), 1e-12)
        return value, metrics | {"weight": jnp.max(weight)}

    def init(features):
        classes = features["tags"].shape[1]
        return {"counts": jnp.zeros(classes, jnp.float32), "pictures": jnp.zeros((), jnp.float32)}

    def update(state, features, ctx):
        tags = features["tags"]
        pictures = jnp.sum(jnp.any(tags, axis=1), dtype=jnp.float32)
        return {
            "counts": state["counts"] + jnp.sum(tags, axis=0, dtype=jnp.float32),
            "pictures": state["pictures"] + pictures,
        }

    memory = dict(init=init, update=update) if resample else {}
    return Term("tag_softmax", features, loss, **memory)
