"""Any number of towers in one space: pictures, texts, sounds, ... (as Symile, arXiv:2411.01053, compares them)."""

import math
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from vlm_jax.models.two_tower import unit


class ManyTower(nn.Module):
    """Towers, and the scale of their logits.

    Attributes:
      towers: modules; the name of each is its modality.
      inputs: keys of the batch that the towers read, in the order of `towers`.
      scale_init: initial factor on similarities (stored as its log, `logit_scale`).
    """

    towers: tuple[nn.Module, ...]
    inputs: tuple[str, ...]
    scale_init: float = 10.0
    can: ClassVar = frozenset({"embed"})

    @nn.compact
    def __call__(self, *inputs, train=False):
        """Returns ({modality: unit-norm [B, D]}, scale) of inputs in the order of `towers`; None leaves one out."""
        scale = jnp.exp(self.param("logit_scale", nn.initializers.constant(math.log(self.scale_init)), ()))
        found = {}
        for tower, given in zip(self.towers, inputs, strict=True):
            if given is not None:
                found[tower.name] = unit(tower(given, train=train).pooled)
        return found, scale

    @property
    def outputs(self) -> dict[str, Any]:
        """`<modality>_embedding` and `scale`."""

        def of_one(place):
            alone = lambda o: [o[key] if i == place else None for i, key in enumerate(self.inputs)]
            return lambda o: next(iter(o.apply("__call__", *alone(o))[0].values()))

        scale = {"scale": lambda o: o.apply("__call__", *[None] * len(self.towers))[1]}
        return {f"{tower.name}_embedding": of_one(place) for place, tower in enumerate(self.towers)} | scale
