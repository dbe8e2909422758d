"""Zero-shot classification of pictures that have several labels: how well each class's name ranks the pictures."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.catalogue import method
from vlm_jax.data.sources import open_source
from vlm_jax.errors import UserError
from vlm_jax.evaluators import classes as class_names
from vlm_jax.evaluators import metrics
from vlm_jax.evaluators.labels import Classes, Look, some
from vlm_jax.evaluators.one_pass import Batch, Columns, Pass, picture_ops
from vlm_jax.evaluators.progress import Progress, Table, memory_limit
from vlm_jax.evaluators.result import Result
from vlm_jax.pretrained import class_embeddings
from vlm_jax.pretrained.similarity import similarity


@method(
    family="evaluators",
    differs="pictures with several labels; the mean average precision of the classes",
)
def multi_label(
    *,
    uri: str,
    split: str | None = None,
    classes: str | Sequence[str] | Mapping[int, str] | None = None,
    label: str | None = None,
    separator: str | None = None,
    templates: str | Sequence[str] = ("{}",),
    where: Mapping[str, Sequence] | None = None,
    ops: str | None = None,
    batch_size: int = 256,
    memory_share: float = 0.25,
) -> Callable[..., Result]:
    """Returns an evaluator `(pretrained, progress=None) -> Result`.

    Metrics: `mean_average_precision` over the classes that have a picture; where scores are equal, its expected value
    over their random orders; `examples`; `unknown_labels`, labels of pictures that are no class. A picture without a
    label counts: no class is right for it. Artifacts: each class's average precision.

    Args:
      uri, split, where, ops, templates: as for `zeroshot`.
      classes: the names, see `classes.read`; defaults to the data set's own names.
      label: the record's field with the labels, a list; defaults to the first field of `classes.LABELS`.
      separator: what stands between labels in a text, such as ";" in a csv; None: a text is one label.
      batch_size: pictures at a time; the metrics do not depend on the batch size.
      memory_share: share of the free memory for the scores; more scores go to a file.
    """
    about = f"data set `{uri}`, split `{split}`" if split else f"data set `{uri}`"
    if label is None or classes is None:
        source = open_source(uri, split)
        label = label or class_names.find_label(source, about)
    if classes is None and separator is not None:
        raise UserError(f"{about}: texts with a separator have no names of their own; give --classes")
    named = Classes(class_names.of_source(source, label, about) if classes is None else class_names.read(classes))
    templates = class_names.read_templates(templates)
    limit = memory_limit(memory_share)

    def evaluate(pretrained: Any, progress: Progress | None = None) -> Result:
        data = Pass(
            pretrained, progress, uri=uri, split=split, where=where,
            ops=picture_ops(ops or pretrained.preprocess, label), batch_size=batch_size, memory=limit,
        )  # fmt: skip
        pretrained = data.pretrained
        look = data.look(named, label)
        data.begin("examples")
        by_pairs = getattr(pretrained, "compares_pairs", False)
        text = None if by_pairs else class_embeddings(pretrained.embed_texts, named.names, templates)

        def rows(batch: Batch) -> Mapping[str, Columns]:
            if by_pairs:
                scores = pretrained.class_logits(batch.inputs, named.names, templates)[batch.kept]
            else:
                scores = similarity(pretrained.embed_image_batch(batch.inputs)[batch.kept], text)
            relevant = np.zeros(scores.shape, bool)
            for row, (found, _) in zip(relevant, batch.about, strict=True):
                row[found] = True
            unknown = np.array([unknown for _, unknown in batch.about])
            return {"examples": {"scores": scores, "relevant": relevant, "unknown": unknown}}

        kept = data.run(rows, about=lambda fields: _classes_of(fields[0], separator, look))
        if not (kept and data.from_first(data.first and bool(data.tables["examples"].read("relevant").any()))):
            raise UserError(f"{about}: no picture has a `{label}` among the classes {some(named.names)}")
        return data.result(lambda tables: _result(tables["examples"], named))

    return evaluate


def _classes_of(value: Any, separator: str | None, look: Look) -> tuple[list[int], int]:
    """The classes of a record's labels, and how many of its labels are no class."""
    if isinstance(value, str):
        labels = [part.strip() for part in (value.split(separator) if separator else [value]) if part.strip()]
    else:
        labels = [] if value is None else np.asarray(value, object).ravel().tolist()
    found = [look(one) for one in labels]
    return sorted({i for i in found if i is not None}), found.count(None)


def _result(examples: Table, classes: Classes) -> Result:
    scores, relevant, unknown = map(examples.read, ("scores", "relevant", "unknown"))
    mean, per_class = metrics.mean_average_precision(scores, relevant)
    numbers = {"mean_average_precision": mean, "examples": float(len(scores)), "unknown_labels": float(unknown.sum())}
    present = np.flatnonzero(relevant.any(axis=0))
    notes = classes.notes(present)
    if unknown.any():
        notes.append(
            f"{unknown.sum():,} labels of {np.count_nonzero(unknown):,} pictures are no class and do not count"
        )
    intervals = {"mean_average_precision": metrics.percentiles(metrics.resampled_map(scores, relevant))}
    artifacts = {"classes": classes.names, "per_class": per_class}
    artifacts["classes_without_picture"] = classes.without_picture(present)
    return Result(numbers, artifacts, intervals, notes)
