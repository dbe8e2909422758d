"""Objectives: the losses of a batch."""

from collections.abc import Mapping
from typing import Any

from vlm_jax import catalogue
from vlm_jax.objectives.accumulation import value_and_grad
from vlm_jax.objectives.objective import Objective, model_inputs

__all__ = ["Objective", "build", "model_inputs", "value_and_grad"]


def build(section: Mapping[str, Any], model: Any) -> Objective:
    """Returns the objective of a config section, `dict(name="contrastive", penalty="softmax", ...)`, on `model`.

    Raises:
      UserError: the name is unknown, or the objective does not take a key.
    """
    return catalogue.build("objectives", section, "config.objective", model=model)
