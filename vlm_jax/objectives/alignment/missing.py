"""Missing modalities: classification of pictures with texts, some of which lack one or the other."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax import config
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.models.vocabulary import is_text
from vlm_jax.objectives.alignment.sentences import Report
from vlm_jax.objectives.contrastive.targets import column
from vlm_jax.objectives.term import WHERE, Term

SIDES = ("image", "text")


@method(
    family="terms",
    system="MissMod-JE",
    paper="arXiv:2407.12616",
    differs="the embedding of a missing modality is predicted from the other one, and fused in its place",
    needs={"objective.classes": 8, "objective.predictor": {"width": 16, "heads": 2}},
)
def missing_modality(
    *,
    model: Any,
    classes: int,
    key: str = "concept",
    present: Mapping[str, str] | None = None,
    fill: str = "predicted",
    prediction: float = 1.0,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    prompts: int = 4,
    predictor: Mapping[str, Any] | None = None,
    pad_id: int | None = None,
) -> Term:
    """Cross-entropy of a late fusion, and a joint embedding of predicted and real embeddings (Kim and Kim 2024).

        logits = W [e_image, e_text] + b,   e = sqrt(D) x embedding, or what is predicted of it where it is missing

    plus `prediction` x the mean of `vicreg` over both directions, on the rows that have both. Read-only prompts make
    the prediction: learned tokens that attend to the other tower's tokens, which do not see them, and a linear map of
    their mean. Here prompts read the tower's last tokens; in the paper they pass through its layers. The paper trains
    biases of pretrained towers alone: `(r"(image|text)/.*bias|objective/.*", {})` in `optimizer.params`, others frozen.

    Args:
      model: linen module with both embeddings, [B, D], and both towers' tokens.
      classes: their number.
      key: the class, a key of the batch, integers [B]; rows below 0 have none.
      present: {"image": key, "text": key} of the batch, bool [B], False for what is missing; defaults to those that the
        op `missing` sets, "image_present" and "token_ids_present".
      fill: "predicted", or "zeros" in the place of what is missing; the prediction then helps the towers alone.
      prediction: weight of the joint embedding; at 0 it is not computed.
      invariance, variance, covariance: see `vicreg`.
      prompts: their number, of each direction.
      predictor: fields of the prompts' blocks, such as dict(width=128, depth=1, heads=4).
      pad_id: id of padding; the tokenizer's, which is the default.

    Metrics: `accuracy`; `complete` and `missing`, that of rows that have both and of those that lack one (NaN without
    any); `joint`, the mean of `vicreg`.
    """
    keys = {"image": "image_present", "text": "token_ids_present", **(present or {})}
    if set(keys) != set(SIDES):
        raise UserError(f"{WHERE}.present names {', '.join(keys)}; expected keys of the batch for: image, text")
    config.choose({"predicted": 0, "zeros": 0}, fill, f"{WHERE}.fill")
    given = {"width": 128, "depth": 1, "heads": 4, "pool": "none", "cross": "inside", **(predictor or {})}
    reader = config.call(Report, given, f"{WHERE}.predictor", sentences=prompts)

    def features(outputs, ctx):
        there = {side: jnp.asarray(outputs[keys[side]]).astype(bool) for side in SIDES}
        real = {side: outputs[f"{side}_embedding"] for side in SIDES}
        for side, one in real.items():
            if one.ndim != 2:
                raise UserError(f"{WHERE}: `{side}_embedding` is {list(one.shape)}; expected one vector, [B, D]")
        real = {side: one * one.shape[-1] ** 0.5 for side, one in real.items()}
        masks = {"image": outputs["image_mask"], "text": is_text(outputs["token_ids"], *ctx.special(pad_id))}
        found = {"real": real, "there": there}
        if prediction or fill == "predicted":
            found["made"] = {}
            for side, other in zip(SIDES, SIDES[::-1], strict=True):
                tokens, mask = outputs[f"{other}_tokens"], masks[other]
                mask = jnp.ones(tokens.shape[:2], bool) if mask is None else mask | ~jnp.any(mask, 1, keepdims=True)
                read = outputs.part(f"read_{other}", reader.clone(dtype=real[side].dtype.name), tokens, mask)
                head = nn.Dense(real[side].shape[-1], dtype=read.dtype)
                found["made"][side] = outputs.part(f"predict_{side}", head, jnp.mean(read, axis=1))
        return found

    def loss(outputs, features, rows, ctx):
        real, there = features["real"], features["there"]
        other = features["made"] if fill == "predicted" else {side: jnp.zeros_like(real[side]) for side in SIDES}
        fused = jnp.concatenate([jnp.where(there[side][:, None], real[side], other[side]) for side in SIDES], axis=1)
        logits = outputs.part("classifier", nn.Dense(classes, dtype=fused.dtype), fused)
        labels, both = column(rows, key, len(logits), f"{WHERE}.key"), there["image"] & there["text"]
        known = labels >= 0
        losses = -jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(labels, classes, dtype=logits.dtype), axis=1)
        losses = jnp.where(labels < classes, losses, jnp.nan)  # the run stops
        mean = lambda x, where, empty: jnp.where(
            jnp.any(where), jnp.sum(jnp.where(where, x, 0)) / jnp.maximum(jnp.sum(where), 1), empty
        )
        right = jnp.argmax(logits, axis=1) == labels
        wheres = {"accuracy": known, "complete": known & both, "missing": known & ~both}
        metrics = {name: mean(right, where, jnp.nan) for name, where in wheres.items()}
        value = mean(losses, known, 0)
        if prediction:
            weights = invariance, variance, covariance
            joint = sum(vicreg(features["made"][side], real[side], both, *weights) for side in SIDES) / 2
            value, metrics["joint"] = value + prediction * joint, joint
        return value, metrics

    return Term("missing_modality", features, loss)


def vicreg(
    x: jax.Array,
    y: jax.Array,
    counts: jax.Array | None = None,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
) -> jax.Array:
    """Returns variance-invariance-covariance regularization (VICReg, Bardes et al. 2022), in the scale of the term
    `vicreg`.

        invariance x mean_i |x_i - y_i|^2 / D + variance x (v(x) + v(y)) / 2 + covariance x (c(x) + c(y))

    v is the mean over dimensions of max(0, 1 - standard deviation), c the sum of squares of the covariances of
    different dimensions, by D. Both are over rows, by their number less one.

    Args:
      x, y: [B, D].
      counts: bool [B], the rows that count; None for all. Of fewer than two, the result is 0.
      invariance, variance, covariance: weights.
    """
    counts = jnp.ones(len(x), bool) if counts is None else counts
    number = jnp.sum(counts, dtype=x.dtype)
    weight = counts[:, None].astype(x.dtype)

    def spread(z):
        centred = weight * (z - jnp.sum(weight * z, axis=0) / jnp.maximum(number, 1))
        over = jnp.matmul(centred.T, centred, precision="highest") / jnp.maximum(number - 1, 1)
        deviations = jnp.sqrt(jnp.diag(over) + 1e-4)
        others = jnp.sum(jnp.square(over)) - jnp.sum(jnp.square(jnp.diag(over)))
        return jnp.mean(jnp.maximum(0, 1 - deviations)), others / z.shape[1]

    (of_x, with_x), (of_y, with_y) = spread(x), spread(y)
    apart = jnp.sum(weight * jnp.square(x - y)) / (jnp.maximum(number, 1) * x.shape[1])
    value = invariance * apart + variance * (of_x + of_y) / 2 + covariance * (with_x + with_y)
    return jnp.where(number > 1, value, 0)
