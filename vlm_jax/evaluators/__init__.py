"""What a model can do, as numbers: `evaluators.build(section)(pretrained) -> Result(metrics, artifacts)`.

An evaluator is a file of tasks/: its arguments, its rows of a batch, its result. `one_pass.Pass` does the rest, the
same during training and alone. Padding is masked, so numbers are the same for every batch size and host count. A second
argument, a `progress.Progress`, keeps what is done, so that a killed evaluation continues.
"""

from collections.abc import Callable, Mapping
from typing import Any

from vlm_jax import catalogue, config
from vlm_jax.evaluators.result import Result

__all__ = ["Result", "build"]


def build(section: Mapping[str, Any]) -> Callable[..., Result]:
    """Returns the evaluator that a config section describes: `type`, and the arguments of the function of that name.

    Raises:
      UserError: an unknown type or key, a key that is missing, classes that cannot be read.
    """
    section = dict(section)
    kind = section.pop("type", None)
    builder = catalogue.get("evaluators", kind, "the type of an evaluator")
    return config.call(builder, section, f"evaluator `{kind}`")
