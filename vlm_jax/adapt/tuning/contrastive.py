"""Tuning of both towers by pairs of pictures and their classes' names: FLYP, CLIP-CITE."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from vlm_jax.adapt.parameters import full
from vlm_jax.adapt.recipe import Extended
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.models.two_tower import unit
from vlm_jax.objectives import Term
from vlm_jax.objectives.contrastive.penalty import HIDDEN
from vlm_jax.params import averages


@method(
    family="parameters",
    paper="arXiv:2212.00638",
    differs="both towers train by the loss of pretraining, on pictures and the names of their classes",
    identity=True,
)
def flyp(model: nn.Module) -> Extended:
    """FLYP (Goyal et al. 2023): CLIP's loss on pairs (picture, prompt of its class), in the place of the cross-entropy.

    As in the authors' code, a batch's pictures of one class are negatives of each other. The paper draws a template for
    each pair; here all names have one. On pairs of your own, `vlm-jax train --config=finetune` does the same.
    """
    return Extended(full(model), (Term("pairs", EMBEDDINGS, pairs),), names_classes=False)


@method(
    family="parameters",
    system="CLIP-CITE",
    paper="arXiv:2407.04003",
    where="equations 2 to 7",
    differs="a classifier of names, pairs apart by class and the base model's similarities tune both towers",
)
def clip_cite(model: nn.Module, *, contrast: float = 0.7, distil: float = 0.1, alpha: float = 0.5) -> Extended:
    """CLIP-CITE (Liu et al. 2024): cross-entropy + contrast * pairs apart by class + distil * KL(p || p_base).

    The cross-entropy has a classifier that begins as the names' embeddings (equation 2), and leaves the text tower. Of
    the pairs (equation 4), pictures of one class are no negatives of each other; both directions are summed. p is the
    softmax of a picture's similarities with the batch's texts (equation 5). The result is `averages.wise_ft` of both
    towers (equation 7).

    Args:
      model: two towers.
      contrast, distil: the paper's lambda and eta; 0 leaves the term out.
      alpha: share of the tuned parameters in the result; 1 keeps them.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha of clip_cite is {alpha}; expected 0 (the base model) to 1 (the tuned one)")

    def names(outputs, features, rows, ctx):
        texts = outputs.part("classes", Table(), features["classes"])
        logits = outputs["scale"] * jnp.matmul(features["batch"], unit(texts).T, precision="highest")
        labels = rows["batch"]["label"]
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        return jnp.mean(losses, where=labels >= 0), {}

    def apart(outputs, features, rows, ctx):
        labels = rows["batch"]["label"]
        return 2 * clip_loss(*paired(outputs, features, labels), labels), {}

    def held(outputs, features, rows, ctx):
        labels, log_p = rows["batch"]["label"], []
        for i, view in enumerate((outputs, outputs.teacher("base"))):
            logits, counts = paired(view, {key: pair[i] for key, pair in features.items()}, labels)
            log_p.append(jax.nn.log_softmax(jnp.where(counts, logits, HIDDEN), axis=1))
        divergence = jnp.sum(jnp.exp(log_p[0]) * (log_p[0] - log_p[1]), axis=1)
        return jnp.mean(divergence, where=counts), {}

    both = {key: lambda o, ctx, f=f: (f(o, ctx), f(o.teacher("base"), ctx)) for key, f in EMBEDDINGS.items()}
    terms = [Term("names", EMBEDDINGS | {"classes": lambda o, ctx: o["zero_shot"]}, names)]
    terms += [Term("pairs", EMBEDDINGS, apart, weight=contrast)] if contrast else []
    terms += [Term("similarities", both, held, weight=distil)] if distil else []
    between = lambda base, tuned: dataclasses.replace(tuned, params=averages.wise_ft(base.params, tuned.params, alpha))
    return Extended(full(model), tuple(terms), names_classes=False, finish=between if alpha != 1 else None)


class Table(nn.Module):
    """Parameters that begin as what is given."""

    @nn.compact
    def __call__(self, x):
        """[C, D] -> [C, D]."""
        return self.param("table", lambda rng: jnp.asarray(x))


EMBEDDINGS = {"batch": lambda o, ctx: o["image_embedding"], "classes": lambda o, ctx: o["text_embedding"]}


def pairs(outputs, features, rows, ctx):
    """CLIP's loss of the labelled pictures with their classes' texts; rows of padding do not count."""
    return clip_loss(*paired(outputs, features, rows["batch"]["label"])), {}


def paired(outputs: Any, features: Any, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (logits [B, B] of pictures with the texts of all rows' classes, bool [B], rows that count)."""
    cosines = jnp.matmul(features["batch"], features["classes"][labels].T, precision="highest")
    return outputs["scale"] * cosines, labels >= 0


def clip_loss(logits: jax.Array, counts: jax.Array, labels: jax.Array | None = None) -> jax.Array:
    """Returns the mean of both directions' cross-entropy of pair i among all pairs; with labels, of other classes."""
    seen = jnp.broadcast_to(counts, logits.shape)
    if labels is not None:
        seen &= (labels[:, None] != labels) | jnp.eye(len(labels), dtype=bool)

    def one_way(logits):
        log_p = jax.nn.log_softmax(jnp.where(seen, logits, HIDDEN), axis=1)
        return -jnp.mean(jnp.diag(log_p), where=counts)

    return (one_way(logits) + one_way(logits.T)) / 2
