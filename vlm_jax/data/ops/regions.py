"""Ops on regions: a phrase with its box, and texts of a prompt and what is predicted after it."""

import string
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np

from vlm_jax.data.box_text import BINS, box_text
from vlm_jax.data.ops.image import height_and_width
from vlm_jax.data.ops.pipeline import Pipeline
from vlm_jax.data.ops.registry import Length, op
from vlm_jax.data.source import BadExample, field
from vlm_jax.errors import UserError

Form = Literal["xyxy", "xywh", "yxyx"]
BEYOND = 1e-3  # of a side: boxes of real data are rounded


@op
def region(
    example: dict,
    rng: np.random.Generator,
    phrases: str,
    boxes: str,
    to: str = "region",
    form: Form = "xyxy",
    shares: bool = False,
    bins: Length = BINS,
    least: Annotated[int, range(2)] = 1,
) -> dict:
    """Sets `region` to one of the picture's phrases, drawn anew every time, and `region_box` to its box as text.

    The picture has to be as it was when the boxes were measured: before crops and mirrors. Resizing keeps the text.

    Args:
      example: holds `image` and the fields.
      rng: the example's generator.
      phrases: path of n texts, or of one.
      boxes: path of their boxes, [n, 4].
      to: name of the field that is set, and of its box with `_box`.
      form: of a box: "xyxy" and "yxyx" hold two corners, "xywh" (COCO) a corner, width and height.
      shares: whether boxes are shares of the picture's sides; else pixels.
      bins: positions that the numbers tell apart, see `box_text`.
      least: a picture without phrases is a bad example; with 0 its phrase and box are empty texts.
    """
    texts, found = field(example, phrases), field(example, boxes)
    texts = [texts] if isinstance(texts, str) else ([] if texts is None else list(texts))
    if not texts:
        if least:
            raise BadExample(f"has no regions under `{phrases}`")
        return example | {to: "", f"{to}_box": ""}
    i = int(rng.random() * len(texts))
    corners = _corners(found, boxes, len(texts), i, form)
    height, width = (1, 1) if shares else height_and_width(_decoded(example))
    text = texts[i].strip() if isinstance(texts[i], str) else ""
    if not text:
        raise BadExample(f"region {i} of `{phrases}` has no phrase", "text")
    return example | {to: text, f"{to}_box": box_text(_inside(corners, height, width, f"box {i} of `{boxes}`"), bins)}


def _decoded(example: dict) -> Any:
    image = field(example, "image")
    if isinstance(image, bytes):
        raise UserError("op `region` compares boxes with the picture's size; put `decode` first, or give shares=True")
    return image


def _corners(boxes: Any, path: str, count: int, i: int, form: Form) -> tuple[float, ...]:
    """Returns (x0, y0, x1, y1) of box i."""
    try:
        found = np.asarray(boxes, float).reshape(-1, 4)
    except (TypeError, ValueError):
        raise BadExample(f"`{path}` is {boxes!r:.60}; expected boxes of four numbers") from None
    if len(found) != count:
        raise BadExample(f"`{path}` has {len(found)} boxes for {count} phrases")
    a, b, c, d = found[i].tolist()
    return {"xyxy": (a, b, c, d), "yxyx": (b, a, d, c), "xywh": (a, b, a + c, b + d)}[form]


def _inside(corners: Sequence[float], height: float, width: float, name: str) -> tuple[float, ...]:
    """Returns (x0, y0, x1, y1) as shares of the picture's sides."""
    x0, y0, x1, y1 = (corner / side for corner, side in zip(corners, (width, height) * 2, strict=True))
    shown = f"{name}, {tuple(round(corner, 3) for corner in corners)} (x0, y0, x1, y1),"
    if not all(-BEYOND <= side <= 1 + BEYOND for side in (x0, y0, x1, y1)):
        raise BadExample(f"{shown} is not inside of the picture, {width} x {height}")
    if not (x0 < x1 and y0 < y1):
        raise BadExample(f"{shown} encloses nothing")
    return x0, y0, x1, y1


@op
def prompted(
    example: dict,
    rng: np.random.Generator,
    tokenizer: Any,
    length: Length,
    prompt: str,
    target: str,
    to: str,
    ops: Pipeline | None = None,
) -> dict:
    """Sets `<to>_token_ids` to int32 [length], a prompt and a target, and `<to>_counts` to bool [length]: the target.

    `prompted(32, "aref :", "{region} : {region_box}", "aref")`: braces stand for texts of the example. The target ends
    with the end token. A target that is too long is cut, and then has no end token. If it, or a text in braces, is
    empty, all is padding: `prompted(32, "aref :", "", "aref")` for data without regions.

    Args:
      example: holds the texts that braces name.
      rng: the example's generator, for `ops`.
      tokenizer: with `encode`, `pad_id` and `eos_id`.
      length: number of tokens.
      prompt: what is given; its tokens do not count.
      target: what is predicted.
      to: first part of the names of the fields that are set.
      ops: ops on the prompt and on the target, such as `lower`.
    """
    token_ids, counts = np.full(length, tokenizer.pad_id, np.int32), np.zeros(length, bool)
    parts = [_filled(template, example) for template in (prompt, target)]
    if all(part is not None for part in parts):
        parts = [ops({"text": part}, rng)["text"] if ops else part for part in parts]
        given, wanted = (tokenizer.encode(part) for part in parts)
        if len(given) >= length:
            raise BadExample(f"the prompt of `{to}` has {len(given)} tokens, and leaves no room in {length}", "text")
        row = [*given, *wanted, tokenizer.eos_id][:length]
        token_ids[: len(row)], counts[len(given) : len(row)] = row, True
    return example | {f"{to}_token_ids": token_ids, f"{to}_counts": counts}


def _filled(template: str, example: dict) -> str | None:
    """Returns a template with the example's texts; None if one of them is empty."""
    texts = {name: field(example, name) for _, name, _, _ in string.Formatter().parse(template) if name}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise UserError(
                f"op `prompted` was given `{name}` of type {type(text).__name__}; expected a text: use `caption` first"
            )
    return template.format_map(texts) or None if all(texts.values()) else None
