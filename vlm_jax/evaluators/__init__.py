"""Evaluators: metrics of a model, `evaluators.build(section)(pretrained) -> Result(metrics, artifacts)`.

An evaluator is a file of tasks/: its arguments, its rows of a batch, its result. `one_pass.Pass` does the rest, during
training and alone. Padding is masked: the metrics do not depend on batch size or host count. A second argument, a
`progress.Progress`, saves finished batches: a killed evaluation continues after the last saved batch.
"""

from collections.abc import Callable, Mapping
from typing import Any

from vlm_jax import catalogue, config
from vlm_jax.errors import UserError
from vlm_jax.evaluators.result import Result

__all__ = ["Result", "build"]


def build(section: Mapping[str, Any]) -> Callable[..., Result]:
    """Returns the evaluator of a config section: `type` names a function, the other keys are its arguments.

    Raises:
      UserError: an unknown type or key, a missing key, or classes that cannot be read.
    """
    section = dict(section)
    kind = section.pop("type", None)
    builder = catalogue.get("evaluators", kind, "the type of an evaluator")
    evaluator = config.call(builder, section, f"evaluator `{kind}`")
    if section.get("gallery", 0) < 0:
        raise UserError(f"evaluator `{kind}`: gallery={section['gallery']}; expected 0 pictures or more")
    return evaluator
