"""Resizing, cropping, padding and patches, without randomness. Resampling is PIL's, antialiased."""

import math
from typing import Literal

import numpy as np
from PIL import Image, ImageChops

from vlm_jax.data.ops.image import Picture, array, check_pixels, height_and_width, pil
from vlm_jax.data.ops.registry import Length, Side, op
from vlm_jax.errors import UserError

Method = Literal["nearest", "bilinear", "bicubic", "lanczos", "area", "hamming"]
METHODS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "area": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}


@op
def crop_to_content(image: object, tolerance: int = 8, margin: float = 0.0, square: bool = True) -> Picture:
    """Crops to the bounding box of all pixels unlike the border colour (the top left pixel).

    Args:
      image: [H, W, C].
      tolerance: largest difference of a channel (0-255) that still counts as border.
      margin: added on each side, as a share of the box's longer side; cut at the picture's edge.
      square: widen the shorter side with border colour, so that later resizing keeps the proportions.
    """
    image = pil(image)
    corner = image.getpixel((0, 0))
    difference = ImageChops.difference(image, Image.new(image.mode, image.size, corner))
    bands = difference.split()
    strongest = bands[0]
    for band in bands[1:]:
        strongest = ImageChops.lighter(strongest, band)
    box = strongest.point([255 * (v > tolerance) for v in range(256)]).getbbox()
    if box is None:
        return image
    left, top, right, bottom = box
    pad = round(margin * max(right - left, bottom - top))
    left, top = max(left - pad, 0), max(top - pad, 0)
    right, bottom = min(right + pad, image.width), min(bottom + pad, image.height)
    image = image.crop((left, top, right, bottom))
    side = max(image.size)
    if not square or image.width == image.height:
        return image
    check_pixels(side, side)
    canvas = Image.new(image.mode, (side, side), corner)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


@op
def resize(
    image: object, height: Side, width: Side | None = None, method: Method = "bicubic", antialias: bool = True
) -> Picture:
    """Resizes to [height, width], proportions not kept, as `PIL.Image.resize` does; width defaults to height.

    Without `antialias` (bilinear only) the result equals `tf.image.resize`, truncated to uint8: big_vision's
    preprocessing.
    """
    width = height if width is None else width
    if antialias:
        return pil(image).resize((width, height), METHODS[method])
    if method != "bilinear":
        raise UserError(f"op `resize` was given antialias=False, method={method!r}; expected method='bilinear'")
    return _bilinear(array(image), height, width)


def _bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [h, w, C] -> [height, width, C] from two neighbours per axis; centres at half pixels."""
    (top, bottom, y), (left, right, x) = _neighbours(image.shape[0], height), _neighbours(image.shape[1], width)
    image = image.astype(np.float32)
    image = image[:, left] + (image[:, right] - image[:, left]) * x[:, None]
    return (image[top] + (image[bottom] - image[top]) * y[:, None, None]).astype(np.uint8)


def _neighbours(size: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(lower index, upper index, float32 weight of the upper) of each of `new` pixels among `size`."""
    place = (np.arange(new, dtype=np.float32) + np.float32(0.5)) * np.float32(size / new) - np.float32(0.5)
    lower = np.floor(place)
    upper = np.minimum(lower + 1, size - 1)
    return np.maximum(lower, 0).astype(int), upper.astype(int), place - lower


@op
def resize_shortest(image: object, size: Side | tuple[Side, Side], method: Method = "bicubic") -> Picture:
    """Resizes the shorter side to `size`; the longer side is truncated to whole pixels, as in torchvision.

    The result covers a size (height, width), proportions kept, sides rounded, as in open_clip.
    """
    h, w = height_and_width(image)
    if isinstance(size, tuple):
        return _scaled(image, min(h / size[0], w / size[1]), method)
    new = (size, int(size * w / h)) if h <= w else (int(size * h / w), size)
    check_pixels(*new)
    return pil(image).resize(new[::-1], METHODS[method])


@op
def resize_longest(image: object, size: Side | tuple[Side, Side], method: Method = "bicubic") -> Picture:
    """Resizes to fit into `size` (a side, or height and width), proportions kept; use `pad` afterwards.

    Sides are rounded.
    """
    (h, w), (height, width) = height_and_width(image), np.broadcast_to(size, 2)
    return _scaled(image, max(h / height, w / width), method)


def _scaled(image: Picture, ratio: float, method: Method) -> Image.Image:
    h, w = (max(round(side / ratio), 1) for side in height_and_width(image))
    check_pixels(h, w)
    return pil(image).resize((w, h), METHODS[method])


@op
def resize_to_patches(image: object, patch: Side, max_patches: Length, method: Method = "bilinear") -> Picture:
    """Resizes to at most `max_patches` patches of side `patch`, proportions kept up to whole patches.

    `max_patches` defaults to the batch's length, with `naflex` in the config's data.

    SigLIP 2 "NaFlex" (arXiv:2502.14786, section 2.4): sides are rounded up to multiples of `patch` at the largest scale
    that fits, found by bisection as in Transformers' `Siglip2ImageProcessor`.
    """
    h, w = height_and_width(image)
    sides = lambda scale: [max(math.ceil(side * scale / patch), 1) * patch for side in (h, w)]
    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        middle = (low + high) / 2
        fits = math.prod(sides(middle)) <= max_patches * patch**2
        low, high = (middle, high) if fits else (low, middle)
    return pil(image).resize(sides(low)[::-1], METHODS[method])


@op
def pack_patches(image: object, patch: Side, max_patches: Length) -> dict[str, np.ndarray]:
    """Cuts a normalised float [H, W, C] into patches, row by row, for packed towers (SigLIP 2 "NaFlex").

    Returns dict(patches=float32 [max_patches, patch * patch * C], zeros at the end; grid=int32 [2], rows and columns).
    `max_patches` defaults to the batch's length, with `naflex` in the config's data.
    """
    h, w, channels = np.shape(image)
    rows, columns = h // patch, w // patch
    if h % patch or w % patch or rows * columns > max_patches:
        size = f"({patch}, {max_patches})"
        raise UserError(f"pack_patches{size} was given an image of {h}x{w}; put `resize_to_patches{size}` before it")
    patches = np.zeros((max_patches, patch * patch * channels), np.float32)
    cells = np.reshape(image, (rows, patch, columns, patch, channels)).swapaxes(1, 2)
    patches[: rows * columns] = cells.reshape(rows * columns, -1)
    return {"patches": patches, "grid": np.array((rows, columns), np.int32)}


@op
def central_crop(
    image: object, height: Side, width: Side | None = None, rounding: Literal["even", "down"] = "even"
) -> Picture:
    """Cuts [height, width] out of the middle; a smaller image is padded with black first.

    Half of an odd margin is rounded to even, as in torchvision, or down, as in Transformers.
    """
    h, w = height_and_width(image)
    width = height if width is None else width
    half = lambda margin: round(margin / 2) if margin >= 0 else -(-margin // 2)
    top, left = (margin // 2 if rounding == "down" else half(margin) for margin in (h - height, w - width))
    return pil(image).crop((left, top, left + width, top + height))


@op
def pad(image: object, height: Side, width: Side | None = None, value: int = 255) -> Picture:
    """Pads evenly with `value` up to at least [height, width]."""
    image = array(image)
    rows, columns = height - image.shape[0], (height if width is None else width) - image.shape[1]
    rows, columns = max(rows, 0), max(columns, 0)
    widths = ((rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2), (0, 0))
    return np.pad(image, widths, constant_values=value)
