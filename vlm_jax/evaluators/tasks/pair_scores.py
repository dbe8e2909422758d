"""A score for each example, by which `vlm-jax select` chooses the examples of a run."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.evaluators.one_pass import Batch, Columns, Pass, field_ops
from vlm_jax.evaluators.progress import Progress, Table, memory_limit
from vlm_jax.evaluators.result import Result
from vlm_jax.evaluators.scores import of_columns

OWN = ("record", "similarity", "characters", "height", "width", "embedding")  # columns


@method(
    family="evaluators",
    paper="arXiv:2304.14108",
    differs="scores of examples, by which data are filtered: how well texts fit pictures, sizes, embeddings",
)
def pair_scores(
    *,
    uri: str,
    split: str | None = None,
    caption: str = "text",
    fields: Sequence[str] = (),
    embeddings: bool = False,
    where: Mapping[str, Sequence] | None = None,
    batch_size: int = 256,
    memory_share: float = 0.25,
) -> Callable[..., Result]:
    """Returns an evaluator `(pretrained, progress=None) -> Result`.

    Its artifacts are columns, a row for each example that can be used: `record` (its number in the data set),
    `similarity` (cosine of picture and text; of a captioner the mean log likelihood of the text), `characters` of the
    text, `height` and `width` in pixels, the chosen fields, and `embedding`, float16 [n, D], of the picture.

    Metrics: `similarity`, its mean; `examples`.

    Args:
      uri, split: the data set, as for `sources.open_source`.
      caption: the field with the text, the first of a list.
      fields: further fields to store: numbers, or texts as a hash (`number_of`).
      embeddings: whether to store embeddings of the pictures, which near duplicates are found by.
      where: field -> values; other examples have no row.
      batch_size: examples at a time.
      memory_share: share of the free memory for the rows; more go to a file.
    """
    if taken := set(fields) & set(OWN):
        raise UserError(f"fields: `{min(taken)}` is a column of its own; rename the field")
    limit = memory_limit(memory_share)

    def evaluate(pretrained: Any, progress: Progress | None = None) -> Result:
        captioner = getattr(pretrained, "is_captioner", False)
        if embeddings and captioner:
            raise UserError("a captioner embeds no pictures; leave embeddings out")
        ops = f"decode | measured | {field_ops(caption, *fields)} | {pretrained.preprocess}"
        data = Pass(
            pretrained, progress, uri=uri, split=split, where=where, batch_size=batch_size, memory=limit,
            ops=f'{ops} | keep("image", "fields", "size")',
        )  # fmt: skip
        for path in (caption, *fields):
            data.check_field(path)
        records = data.records()
        data.begin("rows")

        def about(fields: list, size: np.ndarray) -> list | None:
            text = fields[0][0] if isinstance(fields[0], list | tuple) and fields[0] else fields[0]
            usable = isinstance(text, str) and text.strip()
            return [text, *map(number_of, fields[1:]), *size.tolist()] if usable else None

        def rows(batch: Batch) -> Mapping[str, Columns]:
            text, *own, height, width = zip(*batch.about, strict=True)
            (similarity,) = of_columns(data.pretrained, batch.inputs, [batch.spread(text, text[0])])
            columns = {"record": records[batch.position], "similarity": np.float32(similarity)[batch.kept]}
            columns |= {"characters": np.array([len(one) for one in text], np.int32)}
            columns |= {"height": np.array(height, np.int32), "width": np.array(width, np.int32)}
            columns |= {path: np.array(values, np.float64) for path, values in zip(fields, own, strict=True)}
            if embeddings:
                embedded = data.pretrained.embed_image_batch(batch.inputs)[batch.kept]
                columns["embedding"] = embedded.astype(np.float16)
            return {"rows": columns}

        if not data.run(rows, about=about, columns=("fields", "size")):
            raise UserError(f"{data.about}: no example has a picture and a text `{caption}`")
        return data.result(_finish)

    return evaluate


def number_of(value: Any) -> float:
    """Returns a field's value as a number that equal values share: numbers as they are, texts as a 52-bit hash."""
    if isinstance(value, str):
        return float(int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest(), "little") >> 12)
    if isinstance(value, bool | int | float | np.integer | np.floating):
        return float(value)
    raise UserError(f"a field to store is {value!r:.40}; expected a number or a text")


def _finish(tables: Mapping[str, Table]) -> Result:
    table = tables["rows"]
    columns = {name: table.read(name) for name in table.layout()["columns"]}
    metrics = {"similarity": float(columns["similarity"].mean()), "examples": float(len(table))}
    return Result(metrics, columns)
