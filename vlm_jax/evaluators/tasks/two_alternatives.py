"""Two-alternative choices: which of two pictures is more like a third, or fits a text better?"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.evaluators import metrics
from vlm_jax.evaluators.one_pass import Batch, Columns, Pass, pictures_ops
from vlm_jax.evaluators.progress import Progress, Table, memory_limit
from vlm_jax.evaluators.records import texts
from vlm_jax.evaluators.result import Result


@method(
    family="evaluators",
    paper="arXiv:2412.10594",
    differs="which of two pictures is nearer to a third, or to a text, as people see it",
)
def two_alternatives(
    *,
    uri: str,
    split: str | None = None,
    reference: str,
    images: Sequence[str] = ("first", "second"),
    choice: str | None = None,
    text: bool = False,
    where: Mapping[str, Sequence] | None = None,
    ops: str | None = None,
    batch_size: int = 256,
    memory_share: float = 0.25,
) -> Callable[..., Result]:
    """Returns an evaluator `(pretrained, progress=None) -> Result` of models with embeddings.

    Metrics: `accuracy`, the mean of h where the second picture has the higher cosine with the reference and of 1 - h
    where the first has, h the share of people who chose the second; equal cosines count half. `best`, the mean of
    max(h, 1 - h), which no answer exceeds. `examples`, `left_out` (without choice), `ties`.

    Args:
      uri: the data set, as for `sources.open_source`.
      split: its split.
      reference: the record's field with the reference: a picture, or with `text` a text.
      images: its fields with the two pictures.
      choice: its field with h: 0 for the first, 1 for the second, or a share between. None: the first is right.
      text: whether the reference is a text.
      where: field -> values; other records are left out.
      ops: op string from record to `image`; defaults to the model's preprocessing.
      batch_size: records at a time; the metrics do not depend on the batch size.
      memory_share: share of the free memory for the scores.
    """
    if isinstance(images, str) or len(images) != 2:
        raise UserError(f"two_alternatives: images is {images!r}; expected two fields, of the first and of the second")
    limit = memory_limit(memory_share)
    paths = [*images, *([] if text else [reference])]
    number = {path: f"picture_{i}" for i, path in enumerate(dict.fromkeys(paths))}  # a picture may be its own reference
    fields = [*([reference] if text else []), *([] if choice is None else [choice])]

    def evaluate(pretrained: Any, progress: Progress | None = None) -> Result:
        data = Pass(
            pretrained, progress, uri=uri, split=split, where=where, batch_size=batch_size, memory=limit,
            ops=pictures_ops(ops or pretrained.preprocess, {name: path for path, name in number.items()}, *fields),
            inputs=tuple(number[path] for path in paths),
        )  # fmt: skip
        pretrained = data.pretrained
        data.begin("choices")

        def rows(batch: Batch) -> Mapping[str, Columns]:
            first, second, *third = (pretrained.embed_image_batch(one)[batch.kept] for one in batch.inputs)
            if first.ndim != 2:
                raise UserError("two_alternatives: this model has a vector for each token; expected one for a picture")
            said, people = zip(*batch.about, strict=True)
            near = third[0] if third else pretrained.embed_texts(batch.spread(said, said[0]))[batch.kept]
            cosines = np.stack([np.sum(near * one, axis=1) for one in (first, second)], axis=1)
            return {"choices": {"cosine": cosines, "people": np.array(people, np.float64), "position": batch.position}}

        def about(values: list) -> tuple[str | None, float] | None:
            said = texts(values[:1])[:1] if text else [None]
            people = 0.0 if choice is None else values[-1]
            real = isinstance(people, int | float | np.number) and 0 <= people <= 1
            return (said[0], float(people)) if said and real else None

        if not data.run(rows, about):
            raise UserError(f"{data.about}: no record has a reference and a `{choice}` from 0 to 1")
        return data.result(lambda tables: _result(tables["choices"]), "left_out")

    return evaluate


def _result(choices: Table) -> Result:
    cosine, people = choices.read("cosine"), choices.read("people")
    second, tied = cosine[:, 1] > cosine[:, 0], cosine[:, 1] == cosine[:, 0]
    share = np.where(tied, 0.5, np.where(second, people, 1 - people))
    numbers = {
        "accuracy": float(share.mean()),
        "best": float(np.maximum(people, 1 - people).mean()),
        "examples": float(len(share)),
        "ties": float(tied.sum()),
    }
    artifacts = {"choices": {"position": choices.read("position"), "cosine": cosine, "people": people}}
    return Result(numbers, artifacts, {"accuracy": metrics.interval(share)})
