"""Texts that a model writes on pictures, one for each of several prefixes: answers, boxes."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.errors import UserError
from vlm_jax.evaluators.one_pass import Batch, Columns, Pass
from vlm_jax.evaluators.progress import Table


def check(pretrained: Any) -> None:
    """Raises UserError if a model writes no texts on pictures."""
    if not getattr(pretrained, "is_captioner", False) and "caption" not in getattr(pretrained, "can", ()):
        raise UserError("this task reads what a model writes on pictures: it needs a captioner, and this model is none")


def rows(
    data: Pass,
    batch: Batch,
    asked: Sequence[Sequence[tuple[str, Any]]],
    method: str,
    options: Mapping[str, Any] | None,
) -> Mapping[str, Columns]:
    """Returns rows of the table `written`: what the model writes after each prefix of each picture that counts.

    Args:
      data, batch: the pass and its batch.
      asked: for each picture that counts, (prefix, JSON-able truth) pairs.
      method, options: as for `Pretrained.caption`.
    """
    lines = []
    for nth in range(max(map(len, asked))):  # over the whole batch, so that one shape is compiled
        prefixes = batch.spread([several[min(nth, len(several) - 1)][0] for several in asked], asked[0][0][0])
        texts = data.pretrained.caption_batch(batch.inputs, method, prefix=prefixes, echo=False, **(options or {}))
        for row, place, several in zip(batch.kept, batch.position, asked, strict=True):
            if nth < len(several):
                lines.append((int(place), nth, several[nth][1], texts[row]))
    lines.sort(key=lambda line: line[:2])
    text = "".join(json.dumps(line) + "\n" for line in lines)
    return {"written": {"byte": np.frombuffer(text.encode(), np.uint8)}}


def read(table: Table) -> list[tuple[int, Any, str]]:
    """Returns (place of the picture in the data set, truth, text) of each prefix, in order."""
    lines = map(json.loads, table.read("byte").tobytes().splitlines())
    return [(place, truth, text) for place, _, truth, text in lines]
