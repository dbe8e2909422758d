"""What a batch is scored by."""

from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from vlm_jax import config
from vlm_jax.objectives import captioning, coca, contrastive
from vlm_jax.objectives.accumulation import value_and_grad
from vlm_jax.objectives.objective import Objective, model_inputs

__all__ = ["Objective", "build", "model_inputs", "value_and_grad"]

OBJECTIVES = {
    "contrastive": contrastive.contrastive,
    "captioning": captioning.captioning,
    "denoising": captioning.captioning,  # with a text for a picture
    "coca": coca.coca,
}


def build(section: Mapping[str, Any], model: Any, mesh: Mesh | None = None) -> Objective:
    """Returns the objective of a config section, `dict(name="contrastive", penalty="softmax", ...)`, on `model`.

    `mesh` is where it will run: objectives hand it to kernels that communicate, and know no more of it.

    Raises:
      UserError: unknown name, or a key that the objective does not take.
    """
    arguments = dict(section)
    name = arguments.pop("name", None)
    objective = config.choose(OBJECTIVES, name, "config.objective.name")
    return config.call(objective, arguments, "config.objective", model=model, mesh=mesh)
