"""Tuning of both towers by pairs of pictures and their classes' names: FLYP."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.adapt.parameters import full
from vlm_jax.adapt.recipe import Extended
from vlm_jax.catalogue import method
from vlm_jax.objectives import Term


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


EMBEDDINGS = {"batch": lambda o, ctx: o["image_embedding"], "classes": lambda o, ctx: o["text_embedding"]}


def pairs(outputs, features, rows, ctx):
    """CLIP's loss of the labelled pictures with their classes' texts; rows of padding do not count."""
    labels = rows["batch"]["label"]
    cosines = jnp.matmul(features["batch"], features["classes"][labels].T, precision="highest")
    logits, counts = outputs["scale"] * cosines, labels >= 0

    def one_way(logits):
        log_p = jax.nn.log_softmax(jnp.where(counts[None], logits, -jnp.inf), axis=1)
        return -jnp.mean(jnp.diag(log_p), where=counts)

    return (one_way(logits) + one_way(logits.T)) / 2, {}
