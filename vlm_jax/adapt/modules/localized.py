"""Offsets of few attention heads, which learned scales choose (LoFiT)."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from vlm_jax.adapt.recipe import Extended, Inserted, Masked
from vlm_jax.catalogue import method
from vlm_jax.config import choose
from vlm_jax.errors import UserError
from vlm_jax.models.insertion import new_leaves
from vlm_jax.models.insertions.heads import HeadOutputs
from vlm_jax.objectives import Term, of_model
from vlm_jax.params import masks


@method(
    family="modules",
    system="LoFiT",
    paper="arXiv:2406.01563",
    where="authors' code",
    differs="scales of all attention heads choose a few heads, whose outputs then get offsets",
    count="max(round(share * (L_t * H_t + L_v * H_v)), 1) * D_t // H_t",
)
def lofit(
    model: nn.Module,
    *,
    share: float = 0.03,
    where: str = r".*/attn/out",
    l1: float = 5e-4,
    heads: str = "learned",
    seed: int = 0,
) -> Extended:
    """LoFiT (Yin et al. 2024): tunes scales A with an L1 penalty, then offsets of the heads with the largest |A_h|.

    Both tunings begin with the base model and have the same options; the scales are dropped. Captioners, too (`tune`).

    Args:
      model: with attention.
      share: of the heads, of all places of `where` together; at least one head is chosen.
      where: as for `HeadOutputs`.
      l1: weight of sum |A|.
      heads: "learned", or "random" for comparison: the first tuning then has one step, and decides nothing.
      seed: of random heads.
    """
    if not 0 < share <= 1:
        raise UserError(f"share of lofit is {share}; expected a share of the heads above 0, up to 1")
    choose({"learned": 0, "random": 0}, heads, "the heads of lofit")

    def absolute(outputs, features, rows, ctx):
        return sum(jnp.sum(jnp.abs(leaf)) for leaf in of_model(outputs.params).values()), {}

    penalty = Term("l1", lambda outputs, ctx: outputs["label"], absolute, weight=l1)
    scales = Extended(Inserted((HeadOutputs(where, "scale"),)), (penalty,) if l1 else ())

    def first(this, look):
        tuned = new_leaves(look.tune(scales, **({"steps": 1} if heads == "random" else {})).params)
        importance = {name: np.linalg.norm(leaf, axis=-1) for name, leaf in tuned.items()}
        if heads == "random":
            rng = np.random.default_rng(seed)
            importance = {name: rng.random(leaf.shape) for name, leaf in importance.items()}
        count = max(round(share * sum(leaf.size for leaf in importance.values())), 1)
        chosen = {
            name.replace("inserted_scale", "inserted_offset"): mask[..., None]
            for name, mask in masks.largest(importance, count).items()
        }
        return dataclasses.replace(this, recipe=Masked(masks.rules(chosen), offsets), first=None)

    offsets = (HeadOutputs(where, "offset"),)
    return Extended(Inserted(offsets), first=first)
