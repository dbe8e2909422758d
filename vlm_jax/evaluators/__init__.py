"""What a model can do, as numbers: `evaluators.build(section)(pretrained) -> Result(metrics, artifacts)`.

    zeroshot          classification by class names, with prompt ensembles
    retrieval         pictures by their captions and captions by their pictures
    pixel_neighbour   classification by the nearest training picture in pixels: the baseline a model must beat
    probe             classification by a linear classifier on the image tower's features, of all or a few pictures
    few_shot          classification by methods that adapt a model to a few pictures, over seeds: `adapt.protocol`
    captions          captions that a model writes, against people's
    denoising         how surprised a model from texts to texts is by what was hidden of a text
    foils             pictures with their captions against captions with a wrong object, attribute or order

An evaluator is a file of tasks/: its arguments, its rows of a batch, its result. `one_pass.Pass` does the rest, the
same during training and alone. Padding is masked, so numbers are the same for every batch size and host count. A second
argument, a `progress.Progress`, keeps what is done, so that a killed evaluation continues.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from vlm_jax import config
from vlm_jax.evaluators.metrics import (
    mean_per_class_accuracy,
    retrieval_ranks,
    retrieval_recall,
    top_k_accuracy,
    truth_ranks,
)
from vlm_jax.evaluators.result import Result
from vlm_jax.evaluators.tasks.captions import captions
from vlm_jax.evaluators.tasks.denoising import denoising
from vlm_jax.evaluators.tasks.foils import foils
from vlm_jax.evaluators.tasks.pixel_neighbour import pixel_neighbour
from vlm_jax.evaluators.tasks.probe import probe
from vlm_jax.evaluators.tasks.retrieval import retrieval
from vlm_jax.evaluators.tasks.zeroshot import zeroshot

__all__ = [
    "EVALUATORS",
    "Result",
    "build",
    "captions",
    "denoising",
    "foils",
    "mean_per_class_accuracy",
    "pixel_neighbour",
    "probe",
    "retrieval",
    "retrieval_ranks",
    "retrieval_recall",
    "top_k_accuracy",
    "truth_ranks",
    "zeroshot",
]

EVALUATORS: dict[str, Callable[..., Callable] | str] = {
    "zeroshot": zeroshot,
    "retrieval": retrieval,
    "pixel_neighbour": pixel_neighbour,
    "probe": probe,
    "few_shot": "vlm_jax.adapt.protocol:few_shot",  # of a higher room: imported when it is used
    "captions": captions,
    "denoising": denoising,
    "foils": foils,
}


def build(section: Mapping[str, Any]) -> Callable[..., Result]:
    """Returns the evaluator that a config section describes: `type`, and the arguments of the function of that name.

    Raises:
      UserError: an unknown type or key, a key that is missing, classes that cannot be read.
    """
    section = dict(section)
    kind = section.pop("type", None)
    builder = config.choose(EVALUATORS, kind, "the type of an evaluator")
    if isinstance(builder, str):
        module, _, name = builder.partition(":")
        builder = getattr(importlib.import_module(module), name)
    return config.call(builder, section, f"evaluator `{kind}`")
