"""Image ops: decode, crop, resize, augment, normalise. Resampling is PIL's, antialiased."""

import functools
import io
import math
from typing import Literal

import numpy as np
from PIL import Image, ImageChops

from vlm_jax.data.registry import BadExample, op
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
# Channel statistics by name: of CLIP's released preprocessing, of torchvision's classifiers, of EfficientNet-Lite.
STATISTICS = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "efficientnet_lite": ((127 / 255,) * 3, (128 / 255,) * 3),
}
GREY = np.array((0.299, 0.587, 0.114))  # ITU-R BT.601 luma, as PIL's "L"
Picture = Image.Image | np.ndarray


def pil(image: Picture) -> Image.Image:
    """Returns a loaded RGB(A) or grey PIL image of what an op was given (PIL image or uint8 array [H, W, C])."""
    if isinstance(image, bytes):
        raise UserError("an image op was given encoded bytes; put `decode` first")
    if isinstance(image, np.ndarray):
        return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    return _load(image)


def array(image: Picture) -> np.ndarray:
    """Returns a uint8 array [H, W, C] of what an op was given."""
    if isinstance(image, np.ndarray):
        return image
    image = np.asarray(pil(image))
    return image if image.ndim == 3 else image[..., None]


def _load(image: Image.Image) -> Image.Image:
    try:
        image.load()
    except Exception as error:  # Pillow's decoders raise a dozen types on broken files
        raise BadExample(f"image cannot be decoded: {error}") from None
    return image


def _size(image: Picture) -> tuple[int, int]:
    """(height, width)."""
    return image.shape[:2] if isinstance(image, np.ndarray) else image.size[::-1]


@op
def decode(image: object, background: tuple[int, ...] | int | None = 255) -> Picture:
    """Decodes JPEG, PNG, WebP, ... bytes into RGB.

    Grey, palette and CMYK become RGB as by `PIL.Image.convert`, on which released preprocessing relies too: 16-bit grey
    is clipped at 255, and the camera's orientation (EXIF) is not applied.

    Args:
      image: encoded bytes; an array or a PIL image passes through.
      background: colour under transparent pixels (grey level or RGB); None keeps the alpha channel: [H, W, 4].
    """
    if isinstance(image, np.ndarray):
        return image
    if isinstance(image, bytes):
        try:
            image = Image.open(io.BytesIO(image))
        except Exception as error:
            raise BadExample(f"image cannot be decoded: {str(error).split(' <')[0]}") from None
    if image.mode == "RGB" and image.format == "JPEG":
        return image  # still undecoded: `random_resized_crop` may ask the decoder for a smaller picture
    _load(image)
    transparent = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    if not transparent:
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image.convert("RGBA")
    return image if background is None else _composite(image, background)


def _composite(image: Image.Image, colour: tuple[int, ...] | int) -> Image.Image:
    colour = (colour,) * 3 if isinstance(colour, int) else tuple(colour)
    canvas = Image.new("RGB", image.size, colour)
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas


@op
def random_background(image: object, rng: np.random.Generator, p: float = 1.0) -> Picture:
    """Puts a picture with alpha on a random colour with probability `p`, else on white."""
    colour = tuple(rng.integers(256, size=3).tolist()) if rng.random() < p else 255
    return _composite(pil(image), colour)


@op
def crop_to_content(image: object, tolerance: int = 8, margin: float = 0.0, square: bool = True) -> Picture:
    """Crops to the bounding box of what differs from the border colour (the top left pixel).

    Args:
      image: [H, W, C].
      tolerance: largest difference of a channel (0-255) that still counts as border.
      margin: added on each side, as a share of the box's longer side, where the picture has it.
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
    canvas = Image.new(image.mode, (side, side), corner)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


@op
def resize(
    image: object, height: int, width: int | None = None, method: Method = "bicubic", antialias: bool = True
) -> Picture:
    """Resizes to [height, width] (width: as height), proportions not kept. Equals `PIL.Image.resize`.

    Without `antialias` (bilinear only) it equals `tf.image.resize`, truncated to uint8: big_vision's preprocessing.
    """
    width = height if width is None else width
    if antialias:
        return pil(image).resize((width, height), METHODS[method])
    if method != "bilinear":
        raise UserError(f"op `resize` was given antialias=False, method={method!r}; expected method='bilinear'")
    return _bilinear(array(image), height, width)


def _bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [h, w, C] -> [height, width, C] from two neighbours an axis; centres at half pixels."""
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
def resize_shortest(image: object, size: int | tuple[int, int], method: Method = "bicubic") -> Picture:
    """Resizes so that the shorter side is `size`; the longer is truncated to whole pixels, as in torchvision.

    A size (height, width) is covered, proportions kept, sides rounded, as in open_clip.
    """
    h, w = _size(image)
    if isinstance(size, tuple):
        return _scaled(image, min(h / size[0], w / size[1]), method)
    new = (size, int(size * w / h)) if h <= w else (int(size * h / w), size)
    return pil(image).resize(new[::-1], METHODS[method])


@op
def resize_longest(image: object, size: int | tuple[int, int], method: Method = "bicubic") -> Picture:
    """Resizes to fit into `size` (a side, or height and width), proportions kept, sides rounded; `pad` after it."""
    (h, w), (height, width) = _size(image), np.broadcast_to(size, 2)
    return _scaled(image, max(h / height, w / width), method)


def _scaled(image: Picture, ratio: float, method: Method) -> Image.Image:
    h, w = _size(image)
    return pil(image).resize((max(round(w / ratio), 1), max(round(h / ratio), 1)), METHODS[method])


@op
def resize_to_patches(image: object, patch: int, max_patches: int, method: Method = "bilinear") -> Picture:
    """Resizes to at most `max_patches` patches of side `patch`, proportions kept up to whole patches.

    SigLIP 2 "NaFlex" (arXiv:2502.14786, section 2.4): sides are rounded up to multiples of `patch` at the largest scale
    that fits, found by bisection as in Transformers' `Siglip2ImageProcessor`.
    """
    h, w = _size(image)
    sides = lambda scale: [max(math.ceil(side * scale / patch), 1) * patch for side in (h, w)]
    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        middle = (low + high) / 2
        fits = math.prod(sides(middle)) <= max_patches * patch**2
        low, high = (middle, high) if fits else (low, middle)
    return pil(image).resize(sides(low)[::-1], METHODS[method])


@op
def pack_patches(image: object, patch: int, max_patches: int) -> dict[str, np.ndarray]:
    """Normalised float [H, W, C] -> patches, row by row: the input of a tower with packed patches (SigLIP 2 "NaFlex").

    Returns dict(patches=float32 [max_patches, patch * patch * C], zeros at the end; grid=int32 [2], rows and columns).
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
    image: object, height: int, width: int | None = None, rounding: Literal["even", "down"] = "even"
) -> Picture:
    """Cuts [height, width] out of the middle; a smaller image is padded with black first.

    An odd margin is halved by rounding to even, as in torchvision, or down, as in Transformers.
    """
    h, w = _size(image)
    width = height if width is None else width
    half = lambda margin: round(margin / 2) if margin >= 0 else -(-margin // 2)
    top, left = (margin // 2 if rounding == "down" else half(margin) for margin in (h - height, w - width))
    return pil(image).crop((left, top, left + width, top + height))


@op
def random_crop(image: object, rng: np.random.Generator, height: int, width: int | None = None) -> Picture:
    """Cuts [height, width] out at a uniformly random place. Smaller images raise UserError."""
    image, width = array(image), height if width is None else width
    h, w = image.shape[:2]
    if h < height or w < width:
        raise UserError(f"random_crop({height}, {width}) was given an image of {h}x{w}; put `resize` or `pad` first")
    top, left = int(rng.random() * (h - height + 1)), int(rng.random() * (w - width + 1))
    return image[top : top + height, left : left + width]


@op
def random_resized_crop(
    image: object,
    rng: np.random.Generator,
    size: int,
    scale: tuple[float, float] = (0.9, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    method: Method = "bicubic",
) -> Picture:
    """Cuts out a random box and resizes it to [size, size]: "Inception crop" (arXiv:1409.4842, section 6).

    Args:
      image: [H, W, C].
      rng: the example's generator.
      size: side of the result.
      scale: range of the box's area as a share of the image's.
      ratio: range of the box's width / height, drawn uniformly in its logarithm.
      method: resampling filter.
    """
    h, w = _size(image)
    box = np.array(_random_box(h, w, rng, scale, ratio), float)
    if isinstance(image, Image.Image) and image.format == "JPEG":
        # The decoder scales by 1/2, 1/4, 1/8 almost for nothing: never below the size that the box is resized to.
        shrink = min(box[2] - box[0], box[3] - box[1]) / size
        if shrink >= 2 and image.draft("RGB", (math.ceil(w / shrink), math.ceil(h / shrink))):
            box *= np.tile((image.size[0] / w, image.size[1] / h), 2)
    return pil(image).resize((size, size), METHODS[method], box=tuple(box))


def _random_box(h, w, rng, scale, ratio):
    """(left, top, right, bottom): ten draws, then the largest central box within `ratio`, as in torchvision."""
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = h * w * (scale[0] + (scale[1] - scale[0]) * rng.random())
        r = math.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * rng.random())
        box_w, box_h = round(math.sqrt(area * r)), round(math.sqrt(area / r))
        if 0 < box_w <= w and 0 < box_h <= h:
            left, top = int(rng.random() * (w - box_w + 1)), int(rng.random() * (h - box_h + 1))
            return left, top, left + box_w, top + box_h
    box_w, box_h = min(w, round(h * ratio[1])), min(h, round(w / ratio[0]))
    left, top = (w - box_w) // 2, (h - box_h) // 2
    return left, top, left + box_w, top + box_h


@op
def pad(image: object, height: int, width: int | None = None, value: int = 255) -> Picture:
    """Pads evenly with `value` up to at least [height, width]."""
    image = array(image)
    rows, columns = height - image.shape[0], (height if width is None else width) - image.shape[1]
    rows, columns = max(rows, 0), max(columns, 0)
    widths = ((rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2), (0, 0))
    return np.pad(image, widths, constant_values=value)


@op
def flip(image: object, rng: np.random.Generator, p: float = 0.5) -> Picture:
    """Mirrors left and right with probability `p`."""
    image = array(image)
    return image[:, ::-1] if rng.random() < p else image


@op
def jitter(
    image: object, rng: np.random.Generator, brightness: float = 0.4, contrast: float = 0.4, saturation: float = 0.4
) -> Picture:
    """Scales brightness, contrast about the mean grey, and saturation by factors uniform in 1 +- the argument."""
    image = array(image)
    x = image.reshape(-1, 3).astype(np.float32)
    u = 2 * rng.random(3) - 1
    b, c, s = 1 + brightness * u[0], 1 + contrast * u[1], 1 + saturation * u[2]
    # All three are affine in the pixel: one 3x3 matrix and one offset.
    matrix = b * c * (s * np.eye(3) + (1 - s) * GREY[:, None])
    offset = b * (1 - c) * (x.mean(0) @ GREY) + 0.5
    x = x @ matrix.astype(np.float32)
    x += np.float32(offset)
    return np.clip(x, 0, 255, out=x).astype(np.uint8).reshape(image.shape)


@op
def random_affine(
    image: object,
    rng: np.random.Generator,
    degrees: float = 0.0,
    translate: float = 0.0,
    scale: tuple[float, float] = (1.0, 1.0),
    fill: int = 255,
) -> Picture:
    """Rotates, shifts and scales about the centre, bilinear.

    Args:
      image: [H, W, C].
      rng: the example's generator.
      degrees: rotation, uniform in +- this.
      translate: shift, uniform in +- this share of each side.
      scale: range of the magnification, uniform in its logarithm.
      fill: grey level outside the picture.
    """
    image = pil(image)
    w, h = image.size
    u = 2 * rng.random(4) - 1
    angle = math.radians(degrees * u[0])
    middle, half = (math.log(scale[0]) + math.log(scale[1])) / 2, (math.log(scale[1]) - math.log(scale[0])) / 2
    zoom = math.exp(middle + half * u[1])
    # PIL asks for the inverse map: output pixel -> input pixel.
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    x0, y0 = w / 2 + translate * w * u[2], h / 2 + translate * h * u[3]
    inverse = (cos, sin, w / 2 - cos * x0 - sin * y0, -sin, cos, h / 2 + sin * x0 - cos * y0)
    colour = (fill,) * len(image.getbands())
    return image.transform((w, h), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR, fillcolor=colour)


@op
def random_grey(image: object, rng: np.random.Generator, p: float = 0.1) -> Picture:
    """Replaces the colours by their grey level (still three channels) with probability `p`."""
    return pil(image).convert("L").convert("RGB") if rng.random() < p else image


@op
def to_float(image: object) -> np.ndarray:
    """uint8 [H, W, C] -> float32 in [0, 1]."""
    return np.multiply(array(image), np.float32(1 / 255), dtype=np.float32)


@op
def normalize(
    image: object,
    mean: float | tuple[float, ...] | Literal["clip", "imagenet", "efficientnet_lite"] = 0.5,
    std: float | tuple[float, ...] | None = None,
) -> np.ndarray:
    """uint8 [H, W, C] -> float32 `(image / 255 - mean) / std`; std is 0.5 by default, or the one of a named mean."""
    image = array(image)
    if image.dtype != np.uint8:
        raise UserError(f"op `normalize` was given an image of {image.dtype}; expected uint8: leave out `to_float`")
    height, width, channels = image.shape
    scale, offset = _scale_and_offset(mean, std, channels, width)
    x = np.multiply(image.reshape(height, width * channels), scale, dtype=np.float32)
    return np.subtract(x, offset, out=x).reshape(image.shape)


@functools.lru_cache(256)
def _scale_and_offset(mean, std, channels: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """`x * scale - offset` over a row of pixels [W * C]: numpy is slow on rows of three, fast on long ones."""
    named = STATISTICS.get(mean, (mean, 0.5))
    mean, std = (np.broadcast_to(v, channels) for v in (named[0], named[1] if std is None else std))
    return tuple(np.tile(v, width).astype(np.float32) for v in (1 / (255 * std), mean / std))
