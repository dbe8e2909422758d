"""Any number of towers in one space: pictures, texts, sounds, ... (as Symile, arXiv:2411.01053, compares them)."""

import math
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from vlm_jax.models.two_tower import unit


class ManyTower(nn.Module):
    """Towers, and the scale of their logits.

    Attributes:
      names: modalities, the names of the towers' parameters.
      towers: a module for each.
      inputs: keys of the batch that the towers read, one for each.
      scale_init: initial factor on similarities (stored as its log, `logit_scale`).
    """

    names: tuple[str, ...]
    towers: tuple[nn.Module, ...]
    inputs: tuple[str, ...]
    scale_init: float = 10.0
    can: ClassVar = frozenset({"embed"})

    @nn.compact
    def __call__(self, *inputs, train=False):
        """Returns ({modality: unit-norm [B, D]}, scale) of inputs in the order of `towers`; None leaves one out."""
        scale = jnp.exp(self.param("logit_scale", nn.initializers.constant(math.log(self.scale_init)), ()))
        found = {}
        for name, tower, given in zip(self.names, self.towers, inputs, strict=True):
            if given is not None:
                found[name] = unit(tower.clone(parent=self, name=name)(given, train=train).pooled)
        return found, scale

    @property
    def outputs(self) -> dict[str, Any]:
        """`<modality>_embedding` and `scale`."""

        def of_one(place):
            alone = lambda o: [o[key] if i == place else None for i, key in enumerate(self.inputs)]
            return lambda o: next(iter(o.apply("__call__", *alone(o))[0].values()))

        scale = {"scale": lambda o: o.apply("__call__", *[None] * len(self.towers))[1]}
        return {f"{name}_embedding": of_one(place) for place, name in enumerate(self.names)} | scale
