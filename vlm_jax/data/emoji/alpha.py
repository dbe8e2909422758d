"""The transparency of the emoji, beside their pictures on white: 64 x 64, 16 levels, in one file for all."""

from __future__ import annotations

import functools
import io
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vlm_jax.data.emoji import PREPARED, splits

FILE = "alpha.npz"
STEP = 17  # 255 / 15


class Place(NamedTuple):
    """Where a picture stands: record `row` of `split`; `mask` is its index in this file."""

    split: str
    row: int
    mask: int


def write(path: Path, pictures: Iterable[tuple[str, int, bool, np.ndarray]]) -> None:
    """Writes (style, concept, whether held out, alpha uint8 [64, 64]) of all pictures, in the order of the records."""
    style, concept, held_out, alpha = zip(*pictures, strict=True)
    levels = ((np.stack(alpha).astype(np.uint16) + STEP // 2) // STEP).astype(np.uint8)
    arrays = dict(style=style, concept=np.array(concept, np.int32), held_out=held_out)
    arrays["levels"] = levels[..., ::2] << 4 | levels[..., 1::2]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for name, values in arrays.items():
            stream = io.BytesIO()
            np.save(stream, np.asarray(values))
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), stream.getvalue(), zipfile.ZIP_LZMA)


@functools.cache
def _file() -> tuple[dict[tuple[str, int], Place], np.ndarray]:
    with np.load(PREPARED / FILE) as file:
        rows = dict.fromkeys(splits.SPLITS, 0)
        places = {}
        keys = zip(*(file[name].tolist() for name in ("style", "concept", "held_out")), strict=True)
        for mask, (style, concept, held_out) in enumerate(keys):
            split = splits.split_of(style, held_out)
            places[style, concept] = Place(split, rows[split], mask)
            rows[split] += 1
        return places, file["levels"]


def places() -> dict[tuple[str, int], Place]:
    """Returns (style, concept) -> Place of all pictures."""
    return _file()[0]


def alpha(place: Place) -> np.ndarray:
    """Returns the transparency of a picture, uint8 [64, 64]: 255 where it covers the background."""
    packed = _file()[1][place.mask]
    return np.stack((packed >> 4, packed & 15), -1).reshape(len(packed), -1) * np.uint8(STEP)
