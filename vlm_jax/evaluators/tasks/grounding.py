"""Grounding: the box that a captioner writes after a region's text, against the region's box."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.catalogue import method
from vlm_jax.data.box_text import BINS, box_of_text
from vlm_jax.errors import UserError
from vlm_jax.evaluators import metrics, written
from vlm_jax.evaluators.one_pass import Pass, field_ops
from vlm_jax.evaluators.progress import Progress, Table, memory_limit
from vlm_jax.evaluators.result import Result
from vlm_jax.pretrained import attention_maps


@method(
    family="evaluators",
    paper="arXiv:2403.19596",
    differs="boxes that a captioner writes",
)
def grounding(
    *,
    uri: str,
    split: str | None = None,
    text: str = "regions/text",
    box: str = "regions/box",
    template: str = "{text}",
    bins: int = BINS,
    method: str = "greedy",
    options: Mapping[str, Any] | None = None,
    where: Mapping[str, Sequence] | None = None,
    ops: str | None = None,
    batch_size: int = 256,
    memory_share: float = 0.25,
) -> Callable[..., Result]:
    """Returns an evaluator `(pretrained, progress=None) -> Result` of captioners that write boxes.

    A model writes on after a region's text; the first four whole numbers are its box (x0, y0, x1, y1), see `box_text`.
    Boxes of the data pass through the model's preprocessing. Metrics: `mean_iou`, the mean over regions of
    intersection / union of both boxes; `accuracy`, the share of regions with an IoU of 0.5 or more (as RefCOCO has it);
    `written`, the share of texts with a box; `regions`; `examples`; `left_out` (pictures without regions);
    regions that the preprocessing cuts off do not count. The regions of one picture are drawn together for the
    intervals.

    Args:
      uri: the data set, as for `sources.open_source`.
      split: its split.
      text: the record's field with the texts of n regions.
      box: the field with their boxes (x0, y0, x1, y1), pixels [n, 4].
      template: what the model continues; `{text}` stands for the region's text.
      bins: positions that the written numbers tell apart.
      method: how boxes are written, see `Pretrained.caption`.
      options: other arguments of `Pretrained.caption`, such as `length`.
      where: field -> values; other records are left out.
      ops: op string from record to `image`; defaults to the model's preprocessing.
      batch_size: pictures at a time.
      memory_share: share of the free memory for the texts; more texts go to a file.
    """
    if "{text}" not in template:
        raise UserError(f"template `{template}` has no `{{text}}`")
    limit = memory_limit(memory_share)

    def evaluate(pretrained: Any, progress: Progress | None = None) -> Result:
        written.check(pretrained)
        prepare = ops or pretrained.preprocess
        drawn = attention_maps.ops_of_places(prepare, "grounding")
        string = f'decode | {field_ops(text)} | seen_boxes({drawn}, {json.dumps(box)}, to="seen") | {prepare}'
        data = Pass(
            pretrained, progress, uri=uri, split=split, where=where, batch_size=batch_size, memory=limit,
            ops=f'{string} | keep("image", "fields", "seen")',
        )  # fmt: skip
        data.begin("written")

        def about(fields: list, seen: list) -> list | None:
            if not seen or len(fields[0]) != len(seen) or not any(seen):
                return None
            said = [template.replace("{text}", region) for region in fields[0]]
            return [[prefix, edges] for prefix, edges in zip(said, seen, strict=True) if edges]

        rows = lambda batch: written.rows(data, batch, batch.about, method, options)
        if not data.run(rows, about, columns=("fields", "seen")):
            raise UserError(f"{data.about}: no picture has regions under {text}")
        return data.result(lambda tables: _result(tables["written"], bins, data.counts["examples"]), "left_out")

    return evaluate


def _iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection / union of two boxes (x0, y0, x1, y1)."""
    area = lambda box: max(box[2] - box[0], 0) * max(box[3] - box[1], 0)
    shared = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    return shared / (area(a) + area(b) - shared)


def _result(table: Table, bins: int, examples: int) -> Result:
    lines = written.read(table)
    boxes = [box_of_text(text, bins) for _, _, text in lines]
    iou = np.array([_iou(true, box) if box else 0.0 for (_, true, _), box in zip(lines, boxes, strict=True)])
    shares = {"mean_iou": iou, "accuracy": iou >= 0.5, "written": np.array([box is not None for box in boxes])}
    numbers = {name: float(values.mean()) for name, values in shares.items()}
    numbers |= {"regions": float(len(iou)), "examples": float(examples)}
    intervals = metrics.intervals(shares, units=np.array([place for place, _, _ in lines]))
    artifacts = {"regions": [(place, text, *true) for place, true, text in lines]}
    return Result(numbers, artifacts, intervals)
