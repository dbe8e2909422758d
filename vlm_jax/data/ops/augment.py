"""Random image ops: crops, mirrors, colours, affine maps, backgrounds, several views."""

import math

import numpy as np
from PIL import Image, ImageFilter

from vlm_jax.data.ops.geometry import METHODS, Method
from vlm_jax.data.ops.image import Picture, array, check_pixels, composite, height_and_width, pil
from vlm_jax.data.ops.pipeline import Pipeline
from vlm_jax.data.ops.registry import Number, Side, op
from vlm_jax.data.source import field
from vlm_jax.errors import UserError

GREY = np.array((0.299, 0.587, 0.114))  # ITU-R BT.601 luma, as PIL's "L"


@op
def random_background(image: object, rng: np.random.Generator, p: float = 1.0) -> Picture:
    """Puts a picture with alpha on a random colour with probability `p`, else on white."""
    image = pil(image)
    if "A" not in image.getbands():
        raise UserError("random_background needs a picture with alpha; decode(background=None) keeps it")
    return composite(image, tuple(rng.integers(256, size=3).tolist()) if rng.random() < p else 255)


@op
def random_crop(image: object, rng: np.random.Generator, height: Side, width: Side | None = None) -> Picture:
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
    size: Side,
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
    h, w = height_and_width(image)
    box = np.array(_random_box(h, w, rng, scale, ratio), float)
    if isinstance(image, Image.Image) and image.format == "JPEG":
        # The decoder scales by 1/2, 1/4, 1/8 almost for free; the box stays at least as large as its resized copy.
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
def random_blur(
    image: object, rng: np.random.Generator, p: float = 0.5, sigma: tuple[float, float] = (0.1, 2.0)
) -> Picture:
    """Blurs with probability `p` by a Gaussian whose standard deviation, in pixels, is uniform in `sigma`."""
    chance, place = rng.random(2).tolist()
    blur = ImageFilter.GaussianBlur(sigma[0] + (sigma[1] - sigma[0]) * place)
    return pil(image).filter(blur) if chance < p else image


@op
def view(example: dict, rng: np.random.Generator, to: str, ops: Pipeline) -> dict:
    """Sets `to` to another view [H, W, C] of the picture, by `ops` with draws of its own; `image` stays as it is."""
    example[to] = array(ops({"image": pil(field(example, "image"))}, rng)["image"])
    return example


@op
def views(example: dict, rng: np.random.Generator, to: str, n: Number, ops: Pipeline) -> dict:
    """Sets `to` to n views [n, H, W, C] of the picture, each by `ops` with draws of its own; `image` stays as it is.

    `decode | views("local", 6, random_resized_crop(96, scale=(0.05, 0.4)) | normalize) | random_resized_crop(224)`: the
    place in the op string says which picture the views show, here the whole one.
    """
    # Loaded first: a crop may ask the decoder of a JPEG for a smaller picture, which other views would then see, too.
    image = pil(field(example, "image"))
    first = array(ops({"image": image}, rng)["image"])
    check_pixels(n * first.shape[0], first.shape[1])
    example[to] = np.stack([first, *(array(ops({"image": image}, rng)["image"]) for _ in range(n - 1))])
    return example


@op
def null_image(example: dict, path: str, seed: int = 0) -> dict:
    """Replaces the picture by the NULL image where the field at `path` is false: its text shows nothing (TIP-CLIP).

    The NULL image is uniform noise of the picture's size, the same for all examples. The op stands after crops and
    before `normalize`. See the targets `null_image` (arXiv:2305.10434).
    """
    example[path] = visual = bool(field(example, path))
    if not visual:
        height, width = array(example["image"]).shape[:2]
        example["image"] = np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)
    return example
