"""Modules that begin where an earlier adaptation, on other pictures, ended (PVP)."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.models.insertion import new_leaves
from vlm_jax.zoo.adapters import read_insertions


@method(
    family="modules",
    system="PVP",
    paper="arXiv:2304.13639",
    where="abstract",
    differs="prompts, low-rank updates or adapters begin as another data set trained them",
)
def pretrained_modules(model: nn.Module, *, start: str) -> "Started":
    """Pre-trained parameter-efficient tuning (PVP, Song et al. 2023): two runs of `adapt`, the second one of this.

    Args:
      model: the model that the file was made from.
      start: the file of the first run, `METHOD_SEED.safetensors` of `adapt` or of `save_adapter`.
    """
    return Started(start)


class Started(NamedTuple):
    """The insertions of an adapter's file, trained from its parameters.

    Attributes:
      start: the file.
    """

    start: str

    def insertions(self, model, at):
        return read_insertions(self.start)[0]

    def begin(self, rng, model, leaves):
        _, own = read_insertions(self.start, {name: x for name, x in leaves.items() if name not in new_leaves(leaves)})
        expected = {name: leaf.shape for name, leaf in new_leaves(leaves).items()}
        if expected != {name: leaf.shape for name, leaf in own.items()}:
            raise UserError(f"{self.start} does not hold the parameters of its insertions in this model; adapt again")
        return {name: jnp.asarray(leaf) for name, leaf in own.items()}

    def combine(self, own, leaves):
        return dict(own)
