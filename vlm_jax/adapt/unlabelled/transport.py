"""Pictures without labels, transported to the class names and back (POUF)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax import config
from vlm_jax.adapt.parameters import full
from vlm_jax.adapt.recipe import Extended, Inserted
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.models.insertions.prompts import Context
from vlm_jax.objectives import Term

EMBEDDINGS = {"pool": lambda o, ctx: o["image_embedding"], "classes": lambda o, ctx: o["text_embedding"]}
"""Features of terms on pictures without labels and on class names."""


@method(
    family="prompts",
    system="POUF",
    paper="arXiv:2305.00350",
    differs="pictures without labels and class names are transported to each other; no label is read",
    count="length * D_t",
)
def pouf(
    model: nn.Module,
    *,
    tunes: str = "prompt",
    length: int = 4,
    std: float = 0.02,
    transport: float = 1.0,
    information: float = 0.3,
) -> Extended:
    """POUF (Tanwisuth et al. 2023): transport * `transport_cost` - information * `mutual_information`.

    The labelled pictures do not train; those to choose on choose the learning rate, unless it is given. Weights are of
    the authors' code.

    Args:
      model: two towers.
      tunes: "prompt", a context, or "model", all parameters.
      length, std: of the context.
      transport, information: 0 leaves a term out.
    """
    if not transport and not information:
        raise UserError("pouf: transport and information are 0; one of them has to train")
    recipe = config.choose(
        {"prompt": Inserted((Context(length=length, std=std),)), "model": full(model)}, tunes, "tunes of pouf"
    )
    terms = [Term("transport", EMBEDDINGS, _loss(transport_cost), weight=transport)] if transport else []
    terms += [Term("information", EMBEDDINGS, _loss(mutual_information), weight=-information)] if information else []
    return Extended(recipe, tuple(terms), names_classes=False)


def _loss(function):
    def loss(outputs, features, rows, ctx):
        cosines = jnp.matmul(features["pool"], features["classes"].T, precision="highest")
        return function(cosines, outputs["scale"]), {}

    return loss


def transport_cost(cosines: jax.Array, scale: jax.Array | float) -> jax.Array:
    """Returns the cost of transport from pictures to classes plus that from classes to pictures.

        mean_i sum_c p(c | i) (1 - cos_ic) + mean_c sum_i p(i | c) (1 - cos_ic)

    p(c | i) and p(i | c) are softmaxes of scale * cos over the classes and over the pictures.

    Args:
      cosines: of pictures and classes, float [B, C].
      scale: of the logits.
    """
    one_way = lambda axis: jnp.mean(jnp.sum(jax.nn.softmax(scale * cosines, axis=axis) * (1 - cosines), axis=axis))
    return one_way(1) + one_way(0)


def mutual_information(cosines: jax.Array, scale: jax.Array | float) -> jax.Array:
    """Returns H(mean_i p_i) - mean_i H(p_i), p_i the softmax over classes of scale * cos [B, C]: even, but certain."""
    log_p = jax.nn.log_softmax(scale * cosines, axis=1)
    log_mean = jax.nn.logsumexp(log_p, axis=0) - jnp.log(len(cosines))
    return jnp.mean(jnp.sum(jnp.exp(log_p) * log_p, axis=1)) - jnp.sum(jnp.exp(log_mean) * log_mean)
