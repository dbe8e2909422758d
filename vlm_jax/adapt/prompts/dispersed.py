"""Prompts that order both embedding spaces: classes far apart, pictures near their class (DAPT)."""

import flax.linen as nn
import jax.numpy as jnp

from vlm_jax.adapt import tables
from vlm_jax.adapt.recipe import Extended, Inserted
from vlm_jax.catalogue import method
from vlm_jax.models.insertions.prompts import Context, Prompt
from vlm_jax.objectives import Term


@method(
    family="prompts",
    system="DAPT",
    paper="arXiv:2309.03406",
    where="authors' code",
    differs="class embeddings repel each other, pictures come near the mean of their class",
    count="length * (D_t + D_v)",
)
def dapt(
    model: nn.Module,
    *,
    length: int = 4,
    std: float = 0.02,
    inter_weight: float = 0.1,
    intra_weight: float = 0.1,
    temperature: float = 2.0,
) -> Extended:
    """DAPT (Cho et al. 2023): a context, prompts beside the patches, and two losses.

    inter: the mean of exp(-temperature |w_i - w_j|^2) over pairs of classes.
    intra: the mean of (z - s_y)^2 over pictures and dimensions; s_y is the mean of the base model's embeddings of the
    training pictures of class y. The paper's text and picture prompts have 16 tokens.

    Args:
      model: whose image tower is a transformer.
      length: of the context and of the picture's prompts.
      std: of the context at init.
      inter_weight, intra_weight: 0 leaves a loss out.
      temperature: of the kernel.
    """

    def inter(outputs, features, rows, ctx):
        squares = jnp.sum(jnp.square(features[:, None] - features[None]), axis=-1)
        pairs = jnp.triu(jnp.ones_like(squares), 1)
        return jnp.sum(pairs * jnp.exp(-temperature * squares)) / jnp.maximum(jnp.sum(pairs), 1), {}

    def intra(outputs, features, rows, ctx):
        label = rows["batch"]["label"]
        squares = jnp.mean(jnp.square(features["batch"] - rows["classes"]["prototype"][label]), axis=-1)
        return jnp.mean(squares, where=label >= 0), {}

    pictures = {"batch": lambda o, ctx: o["image_embedding"], "classes": lambda o, ctx: o["prototype"]}
    terms = (
        Term("inter", lambda o, ctx: o["text_embedding"], inter, on="classes", weight=inter_weight),
        Term("intra", pictures, intra, weight=intra_weight),
    )
    return Extended(
        Inserted((Context(length=length, std=std), Prompt(length=length))),
        tuple(term for term in terms if term.weight),
        tables={"prototype": tables.prototypes} if intra_weight else {},
    )
