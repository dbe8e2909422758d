"""Tuning of a tower beside a transformer of another modality (Multimodal Pathway)."""

from typing import NamedTuple

import flax.linen as nn

from vlm_jax.adapt.recipe import Extended, Masked
from vlm_jax.catalogue import method
from vlm_jax.config import choose
from vlm_jax.models.insertions.auxiliary import Auxiliary
from vlm_jax.zoo.adapters import merged
from vlm_jax.zoo.model_init import read_auxiliary


@method(
    family="parameters",
    system="M2PT",
    paper="arXiv:2401.14405",
    differs="a tower trains with a share of another modality's kernels, into which they fold at the end",
    identity=True,
)
def m2pt(model: nn.Module, *, auxiliary: str, tower: str = "image", frozen: bool = False) -> Extended:
    """Multimodal Pathway (Zhang et al. 2024): dense layers of a tower's blocks are W + s V; W, s and V train.

    The result is a plain model with the kernels W + s V, see `models.insertions.auxiliary`.

    Args:
      model: of towers with blocks.
      auxiliary: the model of V, as for `vlm_jax.load`, and its part after a colon: "image", "text" (the default),
        "encoder". Its blocks are as wide as the tower's; blocks that it lacks train without.
      tower: "image" or "text".
      frozen: whether V stays as it is.
    """
    choose({"image": None, "text": None}, tower, "tower of m2pt")
    table = ((r".*/inserted_auxiliary", dict(freeze=True)), (".*", dict(wd=1.0)))
    finish = lambda base, tuned: merged(tuned)
    return Extended(Pathway(auxiliary, tower), optimizer=dict(params=table) if frozen else {}, finish=finish)


class Pathway(NamedTuple):
    """A tower and the auxiliary kernels beside its own.

    Attributes:
      auxiliary: the other model, see `model_init.read_auxiliary`.
      tower: the name of the tower.
    """

    auxiliary: str
    tower: str

    @property
    def _trained(self):
        return Masked(((f"{self.tower}/.*", True), (".*", False)))

    def insertions(self, model, at):
        return (Auxiliary(rf"{self.tower}/blocks(_\d+)?/(attn|mlp)/\w+"),)

    def begin(self, rng, model, leaves):
        return self._trained.begin(rng, model, {**leaves, **read_auxiliary(self.auxiliary, leaves)})

    def combine(self, own, leaves):
        return self._trained.combine(own, leaves)
