"""Images between ops: types, decoding of bytes, conversion to floats."""

import functools
import io
from typing import Literal

import numpy as np
from PIL import Image

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
        raise BadExample(f"image cannot be decoded: {error}") from None
    return image


def height_and_width(image: Picture) -> tuple[int, int]:
    """Returns (height, width) of a PIL image or a uint8 array."""
    return image.shape[:2] if isinstance(image, np.ndarray) else image.size[::-1]


@op
def decode(image: object, background: tuple[int, ...] | int | None = 255) -> Picture:
    """Decodes JPEG, PNG, WebP, ... bytes into RGB.

    Grey, palette and CMYK become RGB by `PIL.Image.convert`, as in released preprocessing: 16-bit grey is clipped at
    255, and the camera's orientation (EXIF) is ignored.

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
    return image if background is None else composite(image, background)


def composite(image: Image.Image, colour: tuple[int, ...] | int) -> Image.Image:
    """Returns an RGBA image on a background of one colour, as RGB."""
    colour = (colour,) * 3 if isinstance(colour, int) else tuple(colour)
    canvas = Image.new("RGB", image.size, colour)
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas


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
    named = STATISTICS.get(mean, (mean, 0.5))
    mean, std = (np.broadcast_to(v, channels) for v in (named[0], named[1] if std is None else std))
    return tuple(np.tile(v, width).astype(np.float32) for v in (1 / (255 * std), mean / std))
