"""DPT: a context, visual prompts, and in the last blocks prompts that know the likeliest classes."""

import flax.linen as nn
import jax.numpy as jnp
import optax

from vlm_jax.adapt.prompts.placing import Joined, Visual, widths
from vlm_jax.adapt.prompts.proxies import PerClass
from vlm_jax.adapt.recipe import Extended
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.models.insertions.class_aware import ClassAware
from vlm_jax.models.insertions.prompts import Context
from vlm_jax.objectives import Term


@method(
    family="prompts",
    system="DPT-CAVPT",
    paper="arXiv:2208.08340",
    where="authors' code",
    differs="the likeliest classes ask the picture's tokens and become prompts of the last blocks",
    count="length * D_t + (L_v - blocks) * classes * D_v"
    " + blocks * (E * D_v + D_v + 2 * D_v * width + D_v**2 + tokens * D_v + 2 * D_v)",
)
def class_aware_prompts(
    model: nn.Module,
    *,
    length: int = 4,
    std: float = 0.02,
    classes: int = 5,
    blocks: int = 1,
    width: int = 32,
    tokens: int = 10,
    weight: float = 1.0,
) -> Extended:
    """Dual-modality prompt tuning with class-aware visual prompts (Xing et al. 2022).

    Adds weight x the mean cross-entropy of a linear classifier on the prompts whose class is the picture's, in each of
    the last blocks. The classifiers are not needed later. In the authors' code the likeliest classes are those of
    written prompts, and text and picture warm up alone; here they are those of the context, without a warm-up.

    Args:
      model: of two towers; the image tower is a transformer.
      length, std: of the context.
      classes: number of likeliest classes, and of the visual prompts of the other blocks.
      blocks, width, tokens: see `ClassAware`.
      weight: 0 leaves the classifiers out.
    """
    widths(model)
    depth = model.image.depth
    if not 0 < blocks < depth:
        raise UserError(f"class_aware_prompts: `blocks` is {blocks}; expected 1 to {depth - 1}, of {depth} blocks")
    module = ClassAware(classes, blocks, width, tokens)

    def terms(known):
        def guesses(outputs, ctx):
            place = outputs.model
            given = place.effective(outputs.params), outputs["image"], known.rows["token_ids"]
            _, u, chosen = module.seen(place.model, *given)
            u = nn.LayerNorm(parent=None, use_bias=False, use_scale=False).apply({}, u)
            kernel = outputs.part("classifiers", PerClass(blocks, (u.shape[-1], len(known.names)), std))
            logits = jnp.einsum("bjkd,jdc->bjkc", u, kernel)
            label = outputs["label"]
            losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, label[:, None, None])
            return losses, (chosen == label[:, None])[:, None] & jnp.ones_like(losses, bool)

        def loss(outputs, features, rows, ctx):
            losses, own = features
            return jnp.sum(losses * own) / jnp.maximum(jnp.sum(own), 1), {}

        return (Term("guesses", guesses, loss, weight=weight),)

    modules = Context(length=length, std=std), module
    return Extended(Joined(Visual(classes, depth - blocks, std), modules), terms if weight else ())
