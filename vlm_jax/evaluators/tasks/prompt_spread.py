"""Zero-shot classification under each of many templates by itself: how much the wording of a prompt matters."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.catalogue import method
from vlm_jax.data.sources import open_source
from vlm_jax.errors import UserError
from vlm_jax.evaluators import classes as class_names
from vlm_jax.evaluators import metrics
from vlm_jax.evaluators.labels import Classes
from vlm_jax.evaluators.one_pass import Batch, Columns, Pass, picture_ops
from vlm_jax.evaluators.progress import Progress, Table, memory_limit
from vlm_jax.evaluators.result import Result
from vlm_jax.pretrained import class_embeddings
from vlm_jax.pretrained.similarity import similarity


@method(
    family="evaluators",
    paper="arXiv:2502.12859",
    differs="zero-shot accuracy under each template alone: mean, worst, spread",
)
def prompt_spread(
    *,
    uri: str,
    split: str | None = None,
    classes: str | Sequence[str] | Mapping[int, str] | None = None,
    label: str | None = None,
    templates: str | Sequence[str] = "imagenet80",
    where: Mapping[str, Sequence] | None = None,
    ops: str | None = None,
    batch_size: int = 256,
    memory_share: float = 0.25,
) -> Callable[..., Result]:
    """Returns an evaluator `(pretrained, progress=None) -> Result` of two towers.

    Metrics, of the accuracies (top 1) under each template alone: `mean`, `worst`, `best`, `spread`, their standard
    deviation; `agreement`, the share of pairs of templates that name a picture alike, averaged over pictures;
    `templates`, their number; `examples`; `left_out`. Where scores are equal, an accuracy is its expected value.
    Artifacts: each template's accuracy. For templates that no training saw, give others than those of the op
    `random_template`.

    Args:
      uri, split, classes, label, where, ops: as for `zeroshot`.
      templates: prompts, at least two; or the name of packaged prompts, see `classes.read_templates`.
      batch_size: pictures at a time; the metrics do not depend on the batch size.
      memory_share: share of the free memory for the rows of the pictures; more rows go to a file.
    """
    about = f"data set `{uri}`, split `{split}`" if split else f"data set `{uri}`"
    if label is None or classes is None:
        source = open_source(uri, split)
        label = label or class_names.find_label(source, about)
    named = Classes(class_names.of_source(source, label, about) if classes is None else class_names.read(classes))
    templates = class_names.read_templates(templates)
    if len(templates) < 2:
        raise UserError(f"prompt_spread has {len(templates)} template; expected at least two, such as imagenet80")
    limit = memory_limit(memory_share)

    def evaluate(pretrained: Any, progress: Progress | None = None) -> Result:
        if getattr(pretrained, "head", None) is not None or getattr(pretrained, "compares_pairs", False):
            raise UserError("prompt_spread compares embeddings of class names; it needs two towers without a head")
        data = Pass(
            pretrained, progress, uri=uri, split=split, where=where,
            ops=picture_ops(ops or pretrained.preprocess, label), batch_size=batch_size, memory=limit,
        )  # fmt: skip
        look = data.look(named, label)
        data.begin("examples")
        texts = [class_embeddings(data.pretrained.embed_texts, named.names, [one]) for one in templates]

        def rows(batch: Batch) -> Mapping[str, Columns]:
            embedded, truth = data.pretrained.embed_image_batch(batch.inputs)[batch.kept], np.array(batch.about)
            scores = [similarity(embedded, text) for text in texts]
            right = np.stack([metrics.truth_ranks(one, truth).within(1) for one in scores], axis=1)
            best = np.stack([np.argmax(one, axis=1) for one in scores], axis=1).astype(np.int32)
            return {"examples": {"truth": truth, "right": right.astype(np.float32), "best": best}}

        data.check_any(data.run(rows, about=lambda fields: look(fields[0])), label, named, look)
        finish = lambda tables: _result(tables["examples"], named, templates, lambda: data.left_out(label, look))
        return data.result(finish, "left_out")

    return evaluate


def _result(examples: Table, classes: Classes, templates: Sequence[str], left_out: Callable) -> Result:
    truth, right, best = map(examples.read, ("truth", "right", "best"))
    accuracy, count = right.astype(np.float64).mean(axis=0), len(templates)
    alike = [np.sum(np.square(np.unique(row, return_counts=True)[1])) for row in best]
    numbers = {
        "mean": accuracy.mean(), "worst": accuracy.min(), "best": accuracy.max(), "spread": accuracy.std(),
        "agreement": (np.mean(alike) - count) / (count * (count - 1)), "templates": count, "examples": len(truth),
    }  # fmt: skip
    intervals = {"mean": metrics.interval(right.mean(axis=1))}
    artifacts = {"templates": {"template": list(templates), "accuracy": accuracy}}
    numbers = {name: float(value) for name, value in numbers.items()}
    return Result(numbers, artifacts, intervals, classes.notes(truth, left_out))
