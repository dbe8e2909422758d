"""Images between ops: types, decoding of bytes, conversion to floats."""

import contextlib
import functools
import io
import threading
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from vlm_jax.data.ops.registry import op
from vlm_jax.data.source import BadExample
from vlm_jax.errors import UserError

# Channel statistics by name: of CLIP's released preprocessing, of torchvision's classifiers, of EfficientNet-Lite.
STATISTICS = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "efficientnet_lite": ((127 / 255,) * 3, (128 / 255,) * 3),
}
Picture = Image.Image | np.ndarray
# Formats that are decoded here, where Pillow can: no others, since some run programs (EPS: Ghostscript).
FORMATS = (
    "JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF", "JPEG2000", "PPM", "DIB", "TGA", "PCX",
)  # fmt: skip
MAX_PIXELS = 2**26
MAX_16_BITS = 65535
EXIF_ORIENTATION = 0x0112
_raising = threading.Lock()


def pil(image: Picture) -> Image.Image:
    """Converts a PIL image or a uint8 array [H, W, C] to a loaded PIL image, RGB(A) or grey."""
    if isinstance(image, bytes):
        raise UserError("an image op was given encoded bytes; put `decode` first")
    if isinstance(image, np.ndarray):
        return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    return _load(image)


def array(image: Picture) -> np.ndarray:
    """Converts a PIL image or a uint8 array to a uint8 array [H, W, C]."""
    if isinstance(image, np.ndarray):
        return image
    image = np.asarray(pil(image))
    return image if image.ndim == 3 else image[..., None]


def _load(image: Image.Image) -> Image.Image:
    try:
        image.load()
    except Exception as error:  # Pillow's decoders raise a dozen types on broken files
        raise BadExample(f"image cannot be decoded: {error}", "picture") from None
    return image


def check_pixels(height: int, width: int, most: int = MAX_PIXELS) -> None:
    """Raises BadExample if a picture would have more pixels than `most`, before it takes memory."""
    if height * width > most:
        raise BadExample(f"image would have {width} x {height} pixels, more than {most:,}", "picture")


@functools.lru_cache(1)
def _formats() -> tuple[str, ...]:
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def height_and_width(image: Picture) -> tuple[int, int]:
    """Returns (height, width) of a PIL image or a uint8 array."""
    return image.shape[:2] if isinstance(image, np.ndarray) else image.size[::-1]


@op
def decode(
    image: object,
    background: tuple[int, ...] | int | None = 255,
    exif: bool = False,
    max_pixels: int = MAX_PIXELS,
    alpha: Literal["composite", "drop"] = "composite",
) -> Picture:
    """Decodes JPEG, PNG, WebP, ... bytes into RGB.

    Grey, palette and CMYK become RGB by `PIL.Image.convert`. 16 bits are scaled to 8, rounded. A picture whose header
    has more pixels than `max_pixels` is a bad example, before it takes memory.

    Args:
      image: encoded bytes; an array or a PIL image passes through.
      background: colour under transparent pixels (grey level or RGB); None keeps the alpha channel: [H, W, 4].
      exif: turns the picture upright, by the camera's orientation (EXIF). The preprocessing of released models ignores
        the orientation.
      alpha: "drop" shows the colours under transparent pixels as they are (`PIL.Image.convert("RGB")`), as OpenAI's and
        open_clip's preprocessing does; "composite" puts transparent pictures on `background`, as Transformers does on
        white.
      max_pixels: the limit. Above Pillow's own, Pillow's is raised to it for the process: later crops are checked, too.
    """
    if isinstance(image, np.ndarray):
        return image
    if max_pixels > (Image.MAX_IMAGE_PIXELS or max_pixels):
        with _raising:
            Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    if isinstance(image, bytes):
        try:
            image = Image.open(io.BytesIO(image), formats=_formats())
        except Image.DecompressionBombError:  # above twice Pillow's limit
            raise BadExample(f"image has more pixels than decode(max_pixels={max_pixels})", "picture") from None
        except Exception as error:
            raise BadExample(f"image cannot be decoded: {str(error).split(' <')[0]}", "picture") from None
    if not isinstance(image, Image.Image):
        what = "null" if image is None else f"a {type(image).__name__}"
        raise BadExample(f"image is {what}; expected the bytes of a picture, or the path of a file", "picture")
    if image.width * image.height > max_pixels:
        size = f"{image.width} x {image.height}"
        raise BadExample(f"image has {size} pixels, more than decode(max_pixels={max_pixels})", "picture")
    image = _upright(image) if exif else image
    if image.mode == "RGB" and image.format == "JPEG":
        return image  # still undecoded: `random_resized_crop` may ask the decoder for a smaller picture
    image = _eight_bits(_load(image))
    transparent = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    if not transparent or alpha == "drop":
        return image if image.mode == "RGB" else image.convert("RGB")
    rgba = image.convert("RGBA")
    return rgba if background is None else composite(rgba, background)


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(EXIF_ORIENTATION, 1) in range(2, 9)
    except Exception:  # of damaged EXIF
        return image
    return ImageOps.exif_transpose(_load(image)) if turned else image


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey, `round(x / 257)`; raises BadExample for modes without a defined range."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        grey = np.asarray(image).astype(np.uint32)
        scaled = Image.fromarray(((grey * 255 + MAX_16_BITS // 2) // MAX_16_BITS).astype(np.uint8))
        return _with_exif(scaled, image)
    if image.mode in ("I", "F"):
        what = "floats" if image.mode == "F" else "integers of 32 bits"
        raise BadExample(f"image has {what}, whose range is unknown; save it with 8 or 16 bits", "picture")
    return image


def composite(image: Image.Image, colour: tuple[int, ...] | int) -> Image.Image:
    """Returns an RGBA image on a background of one colour, as RGB."""
    colour = (colour,) * 3 if isinstance(colour, int) else tuple(colour)
    canvas = Image.new("RGB", image.size, colour)
    canvas.paste(image, mask=image.getchannel("A"))
    return _with_exif(canvas, image)


def _with_exif(image: Image.Image, of: Image.Image) -> Image.Image:
    """Keeps the camera's orientation, for a later `decode(exif=True)`: evaluators decode before the model's ops."""
    if "exif" in of.info:
        image.info["exif"] = of.info["exif"]
    return image


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
    """uint8 [H, W, C] -> float32 `(image / 255 - mean) / std`.

    std defaults to 0.5; a named mean has its own.
    """
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
    return tuple(np.tile(v, width) for v in scale_and_offset(mean, std, channels))


def scale_and_offset(mean: Any = 0.5, std: Any = None, channels: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Returns (scale, offset), float32 [channels], of `normalize(mean, std)`: pixel * scale - offset."""
    named = STATISTICS.get(mean, (mean, 0.5))
    mean, std = (np.broadcast_to(v, channels) for v in (named[0], named[1] if std is None else std))
    return (1 / (255 * std)).astype(np.float32), (mean / std).astype(np.float32)
