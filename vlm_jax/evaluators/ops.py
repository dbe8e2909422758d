"""Ops that evaluation adds to a pipeline: a thumbnail to look at, unchanged fields, regions."""

from typing import Any

import numpy as np

from vlm_jax.data.ops import op
from vlm_jax.data.ops.geometry import METHODS
from vlm_jax.data.ops.image import array, height_and_width, pil
from vlm_jax.data.ops.pipeline import Pipeline
from vlm_jax.data.scenes.source import mask_of
from vlm_jax.data.source import field

SIDE = 96


@op
def thumbnail(example: dict, side: int = SIDE) -> dict:
    """Sets `thumbnail` to the whole picture on white, proportions kept, uint8 [side, side, 3]."""
    image = pil(example["image"])
    scale = side / max(image.size)
    small = image.convert("RGB").resize([max(round(s * scale), 1) for s in image.size], METHODS["bicubic"])
    canvas = np.full((side, side, 3), 255, np.uint8)
    top, left = (side - small.height) // 2, (side - small.width) // 2
    canvas[top : top + small.height, left : left + small.width] = np.asarray(small)
    return example | {"thumbnail": canvas}


@op
def measured(example: dict) -> dict:
    """Sets `size` to the picture's height and width in pixels, int32 [2]."""
    return example | {"size": np.array(height_and_width(example["image"]), np.int32)}


@op
def boxed(example: dict, *paths: str, to: str) -> dict:
    """Sets `to` to a list of the fields at `paths`, in an object array of shape (); a batch of them is [B]."""
    return example | {to: _one_cell([field(example, path) for path in paths])}


@op
def seen_regions(
    example: dict, rng: np.random.Generator, ops: Pipeline, boxes: str, objects: str, masks: str, to: str
) -> dict:
    """Sets `to` to a list of the regions as `ops` show them: bool [2, H, W], the box and the mask of its object.

    The ops change a picture of the box, the mask and black as its three channels: what they cut off is gone, and what
    they add is in no region.

    Args:
      example: the record.
      rng: random numbers.
      ops: from a picture to a picture of the model's input size; none may look at the picture's content.
      boxes: the field with boxes (x0, y0, x1, y1), pixels [n, 4].
      objects: the field with the index of each region's object, [n].
      masks: the field with the objects' masks, run lengths.
      to: the new field.
    """
    size, found = height_and_width(example["image"]), []
    for (x0, y0, x1, y1), index in zip(field(example, boxes), field(example, objects), strict=True):
        drawn = np.zeros((*size, 3), np.uint8)
        drawn[y0:y1, x0:x1, 0] = 255
        drawn[..., 1] = 255 * mask_of(np.asarray(field(example, masks)[index]), *size)
        found.append(_seen(ops, drawn, rng))
    return example | {to: _one_cell(found)}


@op
def seen_boxes(example: dict, rng: np.random.Generator, ops: Pipeline, boxes: str, to: str) -> dict:
    """Sets `to` to a list of the boxes (x0, y0, x1, y1) as `ops` show them, shares of width and height; see
    `seen_regions`. A box that is cut off is ()."""
    size, found = height_and_width(example["image"]), []
    for x0, y0, x1, y1 in field(example, boxes):
        drawn = np.zeros((*size, 3), np.uint8)
        drawn[y0:y1, x0:x1, 0] = 255
        inside = _seen(ops, drawn, rng)[0]
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        height, width = inside.shape
        edges = (
            (columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height)
            if len(rows)
            else ()
        )
        found.append(tuple(map(float, edges)))
    return example | {to: _one_cell(found)}


def _seen(ops: Pipeline, drawn: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Where `ops` show the first two channels of uint8 [h, w, 3], whose third is black: bool [2, H, W]."""
    seen = array(ops({"image": drawn}, rng)["image"]) >= 128
    return np.moveaxis(seen[..., :2] & ~seen[..., 2:], -1, 0)


def _one_cell(value: Any) -> np.ndarray:
    """An object array of shape (), so that a batch keeps the value as it is."""
    cell = np.empty((), object)
    cell[()] = value
    return cell
