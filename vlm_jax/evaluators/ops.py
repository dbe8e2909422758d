"""Ops that evaluation adds to a pipeline: a thumbnail to look at, and unchanged fields."""

import numpy as np

from vlm_jax.data.ops import op
from vlm_jax.data.ops.geometry import METHODS
from vlm_jax.data.ops.image import pil
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
