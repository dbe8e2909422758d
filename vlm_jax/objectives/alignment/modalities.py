"""Classifiers of pictures with texts: heads for each modality and for both, blended; subsets that follow the whole."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.objectives.contrastive.targets import column
from vlm_jax.objectives.term import WHERE, Term

HEADS = "image", "text", "both"


def _embeddings(outputs):
    return {name: outputs[f"{name}_embedding"] for name in HEADS[:2]}


def _head(outputs, name, classes, *parts):
    """Logits [B, classes] of a linear head on what is given, at least fp32."""
    x = jnp.concatenate(parts, axis=-1)
    return outputs.part(name, nn.Dense(classes, dtype=x.dtype, param_dtype=x.dtype), x)


def _losses(logits, labels, counts):
    """Returns the mean cross-entropy of the rows that count; 0 without any."""
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    return jnp.sum(jnp.where(counts, losses, 0)) / jnp.maximum(jnp.sum(counts), 1)


@method(
    family="terms",
    system="GradientBlending",
    paper="arXiv:1905.12681",
    differs="heads of each modality and of both, weighted by how they generalise against how they overfit",
    needs={"objective.classes": 8, "objective.held": "visual"},
)
def blended(
    *,
    model: Any,
    classes: int,
    key: str = "concept",
    held: str | None = None,
    weights: Sequence[float] | None = None,
    every: int = 500,
) -> Term:
    """Gradient-Blending (Wang et al. 2020): sum over heads k of w_k CE_k, of the image, the text and both.

    Every `every` steps, a super-epoch, w is `blend` of the losses on training rows and on held-out rows, which train
    nothing. The losses are means over the super-epoch, of the joint run; the paper trains each head alone from there
    for its estimate. Of (0, 0, 1) the joint head alone trains, of (1, 0, 0) the image's.

    Args:
      model: linen module with two embeddings.
      classes: number of classes.
      key: the class, a key of the batch, integers [B]; rows below 0 are left out.
      held: a key of the batch, bool [B], for instance of the op `mark`: rows that are held out. Not with `weights`.
      weights: of image, text and both, constant: offline, from another run's losses by `blend`. None: they begin equal.
      every: steps of a super-epoch.

    Metrics: `weight_<head>` and `accuracy_<head>`, that on held-out rows if there are any, else on all.
    """
    if (held is None) == (weights is None):
        raise UserError(f"{WHERE}: blended takes `held`, the key of held-out rows, or constant `weights`; give one")
    if weights is not None and (len(weights) != len(HEADS) or min(weights) < 0 or max(weights) == 0):
        raise UserError(f"{WHERE}.weights is {list(weights)}; expected a weight of 0 or more for each of {HEADS}")
    if every < 1:
        raise UserError(f"{WHERE}.every is {every}; expected 1 step or more")

    def features(outputs, ctx):
        parts = _embeddings(outputs)
        heads = {name: _head(outputs, name, classes, parts[name]) for name in HEADS[:2]}
        heads["both"] = _head(outputs, "both", classes, *parts.values())
        labels = column(outputs.rows, key, len(heads["both"]), f"{WHERE}: the key")
        out = jnp.zeros(len(labels), bool) if held is None else outputs[held].astype(bool)
        return heads | {"label": labels, "held": out}

    def of_rows(features):
        """Returns (training losses [3], losses on held-out rows [3])."""
        labels = features["label"]
        sides = [(labels >= 0) & side for side in (~features["held"], features["held"])]
        return [jnp.stack([_losses(features[name], labels, counts) for name in HEADS]) for counts in sides]

    def loss(outputs, features, rows, ctx):
        shares = jnp.asarray(weights, features["both"].dtype) if held is None else ctx.state["weights"]
        labels = features["label"]
        seen = (labels >= 0) & (features["held"] if held is not None else True)
        found = {f"weight_{name}": share for name, share in zip(HEADS, shares, strict=True)}
        for name in HEADS:
            right = jnp.argmax(features[name], axis=1) == labels
            found[f"accuracy_{name}"] = jnp.sum(right & seen) / jnp.maximum(jnp.sum(seen), 1)
        return jnp.sum(shares * of_rows(features)[0]), found

    def init(features):
        numbers = lambda value: jnp.full(len(HEADS), value, features["both"].dtype)
        losses = {"train": numbers(0.0), "held": numbers(0.0)}
        return {
            "weights": numbers(1 / len(HEADS)),
            "sums": losses,
            "before": jax.tree.map(lambda x: x + jnp.nan, losses),
        }

    def update(state, features, ctx):
        now = dict(zip(("train", "held"), of_rows(features), strict=True))
        sums = jax.tree.map(jnp.add, state["sums"], now)
        means = jax.tree.map(lambda x: x / every, sums)
        ended = {"weights": blend(state["before"], means, state["weights"]), "before": means}
        ended["sums"] = jax.tree.map(jnp.zeros_like, sums)
        end = (ctx.step + 1) % every == 0
        return jax.tree.map(lambda a, b: jnp.where(end, a, b), ended, state | {"sums": sums})

    memory = dict(init=init, update=update) if held is not None else {}
    return Term("blended", features, loss, **memory)


def blend(before: Mapping[str, jax.Array], after: Mapping[str, jax.Array], otherwise: jax.Array) -> jax.Array:
    """Returns Gradient-Blending's weights w_k = G_k / O_k^2 / Z, which sum to 1.

    G is how much the loss on held-out rows fell, O how much its distance from the training loss grew. A head whose loss
    rose has the weight 0.

    Args:
      before, after: {"train": losses [K], "held": losses [K]} at the ends of a super-epoch.
      otherwise: [K], the result if no head's loss fell, or of losses that are not finite.
    """
    gain = jnp.maximum(before["held"] - after["held"], 0)
    overfit = (after["held"] - after["train"]) - (before["held"] - before["train"])
    ratio = gain / jnp.maximum(overfit**2, 1e-8)
    total = jnp.sum(ratio)
    return jnp.where(total > 0, ratio / jnp.where(total > 0, total, 1), otherwise)  # NaN is not above 0


@method(
    family="terms",
    system="MM-Robustness",
    paper="arXiv:2304.04385",
    differs="a classifier without some modality follows an average of itself that has all",
    needs={"objective.classes": 8, "objective.teachers": {"average": {"decay": 0.99}}},
)
def modality_subsets(
    *, model: Any, classes: int, key: str = "concept", teacher: str = "average", distil: float = 1.0
) -> Term:
    """Self-distillation between modalities (after McKinzie et al. 2023): the mean over subsets s of image and text of

        CE(f(s), y) + distil * KL(f_average(image, text) || f(s))

    f is a linear head on both embeddings, of which a missing one is 0. `averages.wise_ft` of the parameters before and
    after is the paper's other intervention. The paper's idea; the form of the loss is this project's.

    Args:
      model: linen module with two embeddings.
      classes: number of classes.
      key: the class, a key of the batch, integers [B]; rows below 0 are left out.
      teacher: name of the teacher, an average of the run's parameters; not read if `distil` is 0.
      distil: 0 is training with missing modalities alone.

    Metrics: `accuracy_<subset>`, and `worst`, the lowest of the three.
    """

    def logits_of(outputs):
        image, text = _embeddings(outputs).values()
        none = jnp.zeros_like
        parts = {"image": (image, none(text)), "text": (none(image), text), "both": (image, text)}
        return {name: _head(outputs, "head", classes, *pair) for name, pair in parts.items()}

    def features(outputs, ctx):
        own = logits_of(outputs)
        label = column(outputs.rows, key, len(own["both"]), f"{WHERE}: the key")
        taught = logits_of(outputs.teacher(teacher))["both"] if distil else own["both"]
        return own | {"label": label, "taught": taught}

    def loss(outputs, features, rows, ctx):
        labels, total, found = features["label"], 0, {}
        counts = labels >= 0
        mean = lambda x: jnp.sum(jnp.where(counts, x, 0)) / jnp.maximum(jnp.sum(counts), 1)
        wanted = jax.nn.log_softmax(features["taught"])
        for name in HEADS:
            total += _losses(features[name], labels, counts)
            if distil:
                log_p = jax.nn.log_softmax(features[name])
                total += distil * mean(jnp.sum(jnp.exp(wanted) * (wanted - log_p), axis=1))
            found[f"accuracy_{name}"] = mean(jnp.argmax(features[name], axis=1) == labels)
        return total / len(HEADS), found | {"worst": jnp.min(jnp.stack(list(found.values())))}

    return Term("modality_subsets", features, loss)
