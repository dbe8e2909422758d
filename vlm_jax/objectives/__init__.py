"""What a batch is scored by."""

from collections.abc import Mapping
from typing import Any

from vlm_jax import config
from vlm_jax.objectives import contrastive
from vlm_jax.objectives.accumulation import value_and_grad
from vlm_jax.objectives.objective import Objective

__all__ = ["Objective", "build", "value_and_grad"]

OBJECTIVES = {"contrastive": contrastive.contrastive}


def build(section: Mapping[str, Any], model: Any) -> Objective:
    """Returns the objective of a config section, `dict(name="contrastive", penalty="softmax", ...)`, on `model`.

    Raises:
      UserError: unknown name, or a key that the objective does not take.
    """
    arguments = dict(section)
    name = arguments.pop("name", None)
    objective = config.choose(OBJECTIVES, name, "config.objective.name")
    return config.call(objective, arguments, "config.objective", model=model)
