"""Calibration of zero-shot classification: is the model as often right as it is sure?"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import softmax

from vlm_jax.catalogue import method
from vlm_jax.data.sources import open_source
from vlm_jax.evaluators import classes as class_names
from vlm_jax.evaluators import metrics
from vlm_jax.evaluators.labels import Classes
from vlm_jax.evaluators.naming import namer
from vlm_jax.evaluators.one_pass import Batch, Columns, Pass, picture_ops
from vlm_jax.evaluators.progress import Progress, Table, memory_limit
from vlm_jax.evaluators.result import Result


@method(
    family="evaluators",
    system="CLIP-robustness",
    paper="arXiv:2410.01534",
    claim="robustness: a temperature fitted on other pictures lowers the calibration error",
    differs="confidence against accuracy, before and after a temperature fitted on other pictures",
)
def calibration(
    *,
    uri: str,
    split: str | None = None,
    classes: str | Sequence[str] | Mapping[int, str] | None = None,
    label: str | None = None,
    templates: str | Sequence[str] = ("{}",),
    bins: int = 15,
    where: Mapping[str, Sequence] | None = None,
    ops: str | None = None,
    batch_size: int = 256,
    memory_share: float = 0.25,
) -> Callable[..., Result]:
    """Returns an evaluator `(pretrained, progress=None) -> Result` (Guo et al. 2017, arXiv:1706.04599, section 4.2).

    Metrics: `error` (the expected calibration error), `nll` (mean -log p of the class, nats) and `brier` of the
    probabilities that `Pretrained.classify` gives; `scaled/error`, `scaled/nll`, `scaled/brier`, where every second
    picture's logits are divided by the temperature that the others' likelihood prefers, and the reverse;
    `temperature`, that of all pictures; `confidence`, the mean probability of the best name; `top1`, `examples`,
    `left_out`.

    Args:
      bins: of confidence, of equal width.
      Others: as for `zeroshot`. memory_share: of the free memory for the logits.
    """
    if label is None or classes is None:
        source = open_source(uri, split)
        about = f"data set `{uri}`"
        label = label or class_names.find_label(source, about)
    named = Classes(class_names.of_source(source, label, about) if classes is None else class_names.read(classes))
    templates = class_names.read_templates(templates)
    limit = memory_limit(memory_share)

    def evaluate(pretrained: Any, progress: Progress | None = None) -> Result:
        data = Pass(
            pretrained, progress, uri=uri, split=split, where=where, batch_size=batch_size, memory=limit,
            ops=picture_ops(ops or pretrained.preprocess, label),
        )  # fmt: skip
        look = data.look(named, label)
        data.begin("examples")
        score, scale = namer(data.pretrained, named.names, templates)

        def rows(batch: Batch) -> Mapping[str, Columns]:
            logits = (scale * score(batch.inputs)[batch.kept]).astype(np.float32)
            return {"examples": {"position": batch.position, "label": np.array(batch.about), "logits": logits}}

        left_out = lambda: data.left_out(label, look)
        finish = lambda tables: _result(tables["examples"], named, bins, left_out)
        data.check_any(data.run(rows, about=lambda fields: look(fields[0])), label, named, look)
        return data.result(finish, "left_out")

    return evaluate


def _result(examples: Table, classes: Classes, bins: int, left_out: Callable[[], Counter]) -> Result:
    labels, logits = examples.read("label"), examples.read("logits").astype(np.float64)
    scaled = np.empty_like(logits)
    for fold in (0, 1):
        others = np.arange(len(labels)) % 2 != fold
        scaled[~others] = logits[~others] / (metrics.temperature(logits[others], labels[others]) if others.any() else 1)
    predicted = logits.argmax(axis=1)
    right = predicted == labels
    confidence = softmax(logits, axis=1).max(axis=1)
    numbers = {
        "temperature": metrics.temperature(logits, labels),
        "confidence": float(confidence.mean()),
        "top1": float(right.mean()),
        "examples": float(len(labels)),
    }
    for prefix, own in (("", logits), ("scaled/", scaled)):
        numbers |= {
            f"{prefix}error": metrics.calibration_bins(softmax(own, axis=1).max(axis=1), right, bins).error,
            f"{prefix}nll": metrics.negative_log_likelihood(own, labels),
            f"{prefix}brier": metrics.brier(own, labels),
        }
    predictions = {"position": examples.read("position"), "label": labels, "predicted": predicted}
    artifacts = {"classes": classes.names, "predictions": predictions | {"confidence": confidence}}
    return Result(numbers, artifacts, {"top1": metrics.interval(right)}, classes.notes(labels, left_out))
