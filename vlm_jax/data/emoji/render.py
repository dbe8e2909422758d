"""SVG -> 64 x 64 RGB on white -> WebP, its transparency, and the pictures that must be left out."""

from __future__ import annotations

import collections
import io
from collections.abc import Iterable

import numpy as np
from PIL import Image

from vlm_jax.errors import UserError

SIDE = 64
# Pictures are lossless WebP of at most this many colours. The palette has a root mean square error of 2.3 levels on
# noto. Lossy WebP of the same size has 8.8: its subsampled colour smears the edges of flat drawings.
COLOURS = 64
# A pixel is ink if a channel is this far from white; a picture with a smaller share of ink is blank.
INK_LEVEL = 24
INK_SHARE = 0.02


def render(svg: str) -> np.ndarray:
    """Returns an SVG document as uint8 [64, 64, 3], composited on white."""
    return _raster(svg, "RGB", background="#ffffff")


def transparency(svg: str) -> np.ndarray:
    """Returns the alpha channel of an SVG document, uint8 [64, 64]."""
    return _raster(svg, "RGBA")[..., 3]


def _raster(svg: str, mode: str, **options) -> np.ndarray:
    try:
        import resvg_py
    except ImportError as error:
        raise UserError("rendering the emoji needs resvg_py, which is missing; pip install 'vlm_jax[emoji]'") from error
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE, skip_system_fonts=True, **options)
    pixels = np.asarray(Image.open(io.BytesIO(bytes(png))).convert(mode))
    if pixels.shape[:2] != (SIDE, SIDE):
        raise ValueError(f"rendered {pixels.shape}, expected {(SIDE, SIDE)}")
    return pixels


def encode(pixels: np.ndarray) -> bytes:
    """Returns WebP bytes of uint8 [64, 64, 3], reduced to 64 colours, then lossless."""
    palette = Image.fromarray(pixels).quantize(COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    palette.convert("RGB").save(buffer, format="WEBP", lossless=True, quality=90, method=6)
    return buffer.getvalue()


def ink(pixels: np.ndarray) -> float:
    """Returns the share of pixels that differ visibly from white."""
    return float((pixels.min(-1) < 255 - INK_LEVEL).mean())


def left_out(pictures: Iterable[tuple[str, int, np.ndarray]], styles_apart: tuple[str, ...]) -> dict[tuple, str]:
    """Returns (style, concept) -> reason, for those `pictures` (style, concept, pixels) that would mislead.

    blank      nearly no ink
    ambiguous  another concept of the same style has the same pixels
    leak       one of `styles_apart`, which are kept for testing, has the same pixels
    """
    reasons = {}
    by_pixels = collections.defaultdict(list)
    for style, concept, pixels in pictures:
        by_pixels[pixels.tobytes()].append((style, concept))
        if ink(pixels) < INK_SHARE:
            reasons[style, concept] = "blank"
    for same in by_pixels.values():
        per_style = collections.Counter(style for style, _ in same)
        for style, concept in same:
            if per_style[style] > 1:
                reasons.setdefault((style, concept), "ambiguous")
            elif style not in styles_apart and any(other in styles_apart for other in per_style):
                reasons.setdefault((style, concept), "leak")
    return reasons
