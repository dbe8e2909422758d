"""Ops that evaluation adds to a pipeline: a thumbnail to look at, unchanged fields, regions."""

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
def boxed(example: dict, *paths: str, to: str) -> dict:
    """Sets `to` to a list of the fields at `paths`, in an object array of shape (); a batch of them is [B]."""
    cell = np.empty((), object)
    cell[()] = [field(example, path) for path in paths]
    return example | {to: cell}


@op
def seen_regions(
    example: dict, rng: np.random.Generator, ops: Pipeline, boxes: str, objects: str, masks: str, to: str
) -> dict:
    """Sets `to` to a list of the regions as `ops` show them: bool [2, H, W], the box and the mask of its object.

    The ops change a picture of the box, the mask and black as its three channels: what they cut off is gone, and what
    they add is in no region. An object array of shape (), as of `boxed`.

    Args:
      example: the record.
      rng: random numbers.
      ops: from a picture to a picture of the model's input size; none may look at the picture's content.
      boxes: the field with boxes (x0, y0, x1, y1), pixels [n, 4].
      objects: the field with the index of each region's object, [n].
      masks: the field with the objects' masks, run lengths.
      to: the new field.
    """
    height, width = height_and_width(example["image"])
    found = []
    for (x0, y0, x1, y1), index in zip(field(example, boxes), field(example, objects), strict=True):
        drawn = np.zeros((height, width, 3), np.uint8)
        drawn[y0:y1, x0:x1, 0] = 255
        drawn[..., 1] = 255 * mask_of(np.asarray(field(example, masks)[index]), height, width)
        seen = array(ops({"image": drawn}, rng)["image"]) >= 128
        found.append(np.moveaxis(seen[..., :2] & ~seen[..., 2:], -1, 0))
    cell = np.empty((), object)
    cell[()] = found
    return example | {to: cell}
