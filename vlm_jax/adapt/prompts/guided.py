"""Contexts that stay near the base model's knowledge: its texts (KgCoOp), its predictions (ProGrad)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.adapt.recipe import Extended, Inserted
from vlm_jax.catalogue import method
from vlm_jax.models.insertions.prompts import Context
from vlm_jax.objectives import Term
from vlm_jax.objectives.combinations import project


@method(
    family="prompts",
    paper="arXiv:2303.13283",
    where="equation 4",
    differs="a context whose class embeddings stay near those of written prompts",
    count="length * D_t",
)
def kgcoop(model: nn.Module, *, length: int = 4, std: float = 0.02, weight: float = 8.0) -> Extended:
    """KgCoOp (Yao et al. 2023): adds weight x the mean of |w_i - w_i^clip|^2 over classes.

    w are the class embeddings under the context, w^clip those of the base model and the given templates.
    """

    def distance(outputs, ctx):
        return jnp.sum(jnp.square(outputs["text_embedding"] - outputs["zero_shot"]), axis=-1)

    prior = Term(
        "prior", distance, lambda o, features, rows, ctx: (jnp.mean(features), {}), on="classes", weight=weight
    )
    return Extended(Inserted((Context(length=length, std=std),)), (prior,) if weight else ())


@method(
    family="prompts",
    paper="arXiv:2205.14865",
    where="equations 3 to 5",
    differs="a context whose gradient does not work against the zero-shot predictions",
    count="length * D_t",
)
def prograd(model: nn.Module, *, length: int = 4, std: float = 0.02, strength: float = 1.0) -> Extended:
    """ProGrad (Zhu et al. 2023): the classes' gradient, without what raises KL(zero-shot || prompted)."""
    gradients = project(keep="classes", against="zero_shot", strength=strength)
    return Extended(Inserted((Context(length=length, std=std),)), (zero_shot_divergence(),), gradients)


def zero_shot_divergence(name: str = "zero_shot", texts: str = "zero_shot", weight: float = 1.0) -> Term:
    """The mean over pictures of KL(zero-shot || prompted), of the softmax over classes.

    Args:
      name: of the term.
      texts: the entry of "classes" with the base model's embeddings of the classes.
      weight: of the term.
    """

    def images(outputs, ctx):
        return outputs["image_embedding"], outputs.teacher("base")["image_embedding"]

    def loss(outputs, features, rows, ctx):
        image, base = features["batch"]
        log_p = lambda x, y: jax.nn.log_softmax(outputs["scale"] * jnp.matmul(x, y.T, precision="highest"))
        wanted = jax.lax.stop_gradient(log_p(base, rows["classes"][texts]))
        divergence = jnp.sum(jnp.exp(wanted) * (wanted - log_p(image, features["classes"])), axis=-1)
        return jnp.mean(divergence, where=rows["batch"]["label"] >= 0), {}

    features = {"batch": images, "classes": lambda outputs, ctx: outputs["text_embedding"]}
    return Term(name, features, loss, weight=weight)
