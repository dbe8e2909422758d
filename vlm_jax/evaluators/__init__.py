"""What a model can do, as numbers: `evaluators.build(section)(pretrained, mesh) -> Result(metrics, artifacts)`.

A third argument, a `progress.Progress`, keeps what is done so far, so that a killed evaluation goes on.

    zeroshot          classification by class names, with prompt ensembles
    retrieval         pictures by their captions and captions by their pictures
    pixel_neighbour   classification by the nearest training picture in pixels: the baseline a model must beat
    probe             classification by a linear classifier on the image tower's features, of all or a few pictures
    few_shot          classification by few-shot heads on the embeddings: Tip-Adapter, Gaussians, probes, over seeds
    captions          captions that a model writes, against people's
    denoising         how surprised a model from texts to texts is by what was hidden of a text
    foils             pictures with their captions against captions with a wrong object, attribute or order

The same during training and alone; padding is masked, so numbers are the same for every batch size and host count.
"""

from collections.abc import Callable, Mapping
from typing import Any

from vlm_jax import config
from vlm_jax.evaluators.captions import captions
from vlm_jax.evaluators.denoising import denoising
from vlm_jax.evaluators.few_shot import few_shot
from vlm_jax.evaluators.foils import foils
from vlm_jax.evaluators.metrics import (
    mean_per_class_accuracy,
    retrieval_ranks,
    retrieval_recall,
    top_k_accuracy,
    truth_ranks,
)
from vlm_jax.evaluators.pixel_neighbour import pixel_neighbour
from vlm_jax.evaluators.probe import probe
from vlm_jax.evaluators.result import Result
from vlm_jax.evaluators.retrieval import retrieval
from vlm_jax.evaluators.zeroshot import zeroshot

__all__ = [
    "EVALUATORS",
    "Result",
    "build",
    "captions",
    "denoising",
    "few_shot",
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

EVALUATORS: dict[str, Callable[..., Callable]] = {
    "zeroshot": zeroshot,
    "retrieval": retrieval,
    "pixel_neighbour": pixel_neighbour,
    "probe": probe,
    "few_shot": few_shot,
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
    return config.call(builder, section, f"evaluator `{kind}`")
