"""Single drawings for scenes: an emoji cut out, scaled, coloured, turned; premultiplied uint8 [h, w, 4]."""

from __future__ import annotations

import functools
import io
import threading
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
from PIL import Image

from vlm_jax.data.emoji import PREPARED, alpha
from vlm_jax.data.scenes import words

COLOURS = {
    "red": (220, 40, 40), "yellow": (245, 220, 50), "green": (60, 170, 70), "blue": (60, 100, 230),
    "purple": (150, 70, 200), "grey": (170, 170, 170),
}  # fmt: skip
MIX = 0.9  # share of the colour; the rest is the drawing's own, which keeps it recognisable
CACHE_BYTES = 64 << 20  # of drawings, and again of scaled ones
SEEN = 8  # alpha above which a pixel counts for the crop
COVERS = 128  # alpha from which a pixel belongs to the object's mask


class _Cache:
    """The least recently used arrays leave when their bytes pass the limit."""

    def __init__(self, limit: int):
        self.limit, self.bytes, self.kept, self.lock = limit, 0, OrderedDict(), threading.Lock()

    def __call__(self, key: tuple, make: Callable[[], np.ndarray]) -> np.ndarray:
        with self.lock:
            if key in self.kept:
                self.kept.move_to_end(key)
                return self.kept[key]
        value = np.ascontiguousarray(make())
        with self.lock:
            self.bytes += value.nbytes - (self.kept[key].nbytes if key in self.kept else 0)
            self.kept[key] = value
            while self.bytes > self.limit and len(self.kept) > 1:
                self.bytes -= self.kept.popitem(last=False)[1].nbytes
        return value


_drawings, _scaled_drawings = _Cache(CACHE_BYTES), _Cache(CACHE_BYTES)


def cached_bytes() -> int:
    """Returns the size of the drawings that this process keeps, at most twice CACHE_BYTES."""
    return _drawings.bytes + _scaled_drawings.bytes


def covers(pixels: np.ndarray) -> np.ndarray:
    """Returns bool [h, w]: which pixels of a drawing belong to its mask."""
    return pixels[..., 3] >= COVERS


@functools.cache
def _records(split: str) -> Callable[[int], bytes]:
    """Row -> encoded picture; no other field is decoded."""
    import tensorflow_datasets as tfds  # 0.7 s, hence here

    builder = tfds.builder_from_directory(str(PREPARED))
    rows = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    features = tfds.features.FeaturesDict({"image": builder.info.features["image"]})
    skip = {"image": tfds.decode.SkipDecoding()}
    return lambda row: features.deserialize_example_np(rows[row], decoders=skip)["image"]


def drawing(style: str, concept: int) -> np.ndarray:
    """Returns an emoji as premultiplied uint8 [h <= 64, w <= 64, 4], cropped to what is drawn. Do not write into it."""
    return _drawings((style, concept), lambda: _cut_out(style, concept))


def _cut_out(style: str, concept: int) -> np.ndarray:
    place = alpha.places()[style, concept]
    on_white = np.asarray(Image.open(io.BytesIO(_records(place.split)(place.row))).convert("RGB"))
    a = alpha.alpha(place).astype(np.int16)[..., None]
    colour = np.clip(on_white - (255 - a), 0, a)
    return _tight(np.concatenate((colour, a), -1).astype(np.uint8))


def _tight(pixels: np.ndarray) -> np.ndarray:
    seen = pixels[..., 3] > SEEN
    (rows,), (columns,) = np.nonzero(seen.any(1)), np.nonzero(seen.any(0))
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _pillow(pixels: np.ndarray) -> Image.Image:
    """As "RGBX": Pillow itself would premultiply "RGBA" a second time."""
    height, width = pixels.shape[:2]
    return Image.frombuffer("RGBX", (width, height), np.ascontiguousarray(pixels).data, "raw", "RGBX", 0, 1)


def _scaled(pixels: np.ndarray, side: int) -> np.ndarray:
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    return np.asarray(_pillow(pixels).resize(size, Image.Resampling.BILINEAR))


def _tinted(pixels: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """The colour times the drawing's lightness, spread around 0.9; see `MIX`."""
    own = pixels.astype(np.float32)
    a = own[..., 3:]
    light = own[..., :3].mean(-1, keepdims=True) / np.maximum(a, 1)
    light = 0.9 + 0.6 * (light - (light * a).sum() / a.sum())
    tint = np.asarray(colour, np.float32) / 255 * np.clip(light, 0.1, 1.15) * a
    mixed = np.minimum(MIX * tint + (1 - MIX) * own[..., :3], a)
    return np.concatenate((mixed + 0.5, a), -1).astype(np.uint8)


def sprite(
    style: str, concept: int, side: int, *, colour: str = "", angle: float = 0.0, mirrored: bool = False
) -> np.ndarray:
    """Returns a drawing as it stands in a scene, premultiplied uint8 [h, w, 4].

    Args:
      style, concept: of the emoji.
      side: pixels of the longer side, after turning.
      colour: a key of COLOURS, or "" for its own colours.
      angle: degrees against the clock; 180 is exact.
      mirrored: left and right exchanged, after turning.
    """
    pixels = _scaled_drawings((style, concept, side, angle), lambda: _turned(style, concept, side, angle))
    pixels = pixels[:, ::-1] if mirrored else pixels
    return _tinted(pixels, COLOURS[colour]) if colour else pixels


def _turned(style: str, concept: int, side: int, angle: float) -> np.ndarray:
    pixels = drawing(style, concept)
    if angle in (0, 180):
        return _scaled(pixels, side)[:: -1 if angle else 1, :: -1 if angle else 1]
    turned = _pillow(pixels).rotate(angle, Image.Resampling.BILINEAR, expand=True)
    return _scaled(_tight(np.asarray(turned)), side)


# --- what can be seen of a drawing ----------------------------------------------------------------------------------

GREY_CHROMA = 40  # mean chroma, in levels, below which "grey" says nothing
TURN_DIFFERENCE = 20  # mean difference, in levels, by which a half turn must change a drawing
DIAGONAL = (20, 70)  # degrees of a long axis that make "tilted" mean nothing
LONG = 1.3  # ratio of the spreads along the two axes from which a drawing has a long axis


@functools.lru_cache(1 << 14)
def visible(style: str, concept: int) -> frozenset[str]:
    """Returns which of "grey", "tilted", "upside-down" can be seen when applied to a drawing."""
    pixels = drawing(style, concept).astype(np.float32)
    colour, a = pixels[..., :3], pixels[..., 3]
    chroma = (colour.max(-1) - colour.min(-1)).sum() / max(a.sum() / 255, 1)
    found = ["grey"] if chroma >= GREY_CHROMA else []
    if concept in words.without_up():
        return frozenset(found)
    on_grey = colour + 127.5 * (1 - a[..., None] / 255)
    half_turn = np.abs(on_grey - on_grey[::-1, ::-1]).mean()
    y, x = np.nonzero(a >= COVERS)
    spread, axes = np.linalg.eigh(np.cov(np.stack((x, y)).astype(np.float64)))
    slope = np.degrees(np.arctan2(abs(axes[1, 1]), abs(axes[0, 1])))
    long = spread[1] > LONG**2 * max(spread[0], 1e-9)
    if long and DIAGONAL[0] <= slope <= DIAGONAL[1]:
        return frozenset(found)
    if half_turn >= TURN_DIFFERENCE:
        found += ["upside-down", "tilted"]
    elif long:
        found += ["tilted"]
    return frozenset(found)
