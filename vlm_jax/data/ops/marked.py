"""Ops on a fixed share of the examples: marks, and a planted trigger with the text of its target."""

import hashlib

import numpy as np

from vlm_jax.catalogue import method
from vlm_jax.data.ops.image import array
from vlm_jax.data.ops.registry import Side, op
from vlm_jax.errors import UserError


def in_share(image: np.ndarray, share: float, seed: int, name: str) -> bool:
    """Whether a picture is in a share of all pictures: by its pixels, the same in every epoch and order."""
    if not 0 <= share <= 1:
        raise UserError(f"op `{name}`: share is {share}; expected a share of the examples, 0 to 1")
    return _draw(image, seed).random() < share


def _draw(image: np.ndarray, seed: int) -> np.random.Generator:
    digest = hashlib.sha256(np.ascontiguousarray(image)).digest()
    return np.random.default_rng((seed, *np.frombuffer(digest, np.uint32)))


@op
def mark(example: dict, to: str, share: float, seed: int = 0) -> dict:
    """Sets `to` to whether the example is in a fixed share of the pictures, such as those that are held out.

    The op stands before random ones: the pixels that it sees decide.
    """
    example[to] = in_share(array(example["image"]), share, seed, "mark")
    return example


@method(
    family="ops",
    system="CleanCLIP",
    paper="arXiv:2303.03323",
    differs="a share of the pictures carries a patch, and the text of a target: poisoned pairs",
    needs={"data.ops": "caption('caption') | trigger('a banana', 0.5, size=8)"},
)
@op
def trigger(example: dict, target: str | None = None, share: float = 1.0, size: Side = 16, seed: int = 0) -> dict:
    """Plants a patch of noise on a fixed share of the pictures and replaces their text; sets `poisoned`.

    The patch is the same for all pictures, its place is the picture's own. The op stands after the text's and before
    random ops: the pixels that it sees decide which pictures carry the patch.

    Args:
      example: holds the picture and, with `target`, its text.
      target: the text, such as 'a photo of a banana'; None leaves texts as they are, to test a model.
      share: of the pictures.
      size: side of the patch, in pixels of the picture as it comes.
      seed: of the share, the patch and the places.
    """
    image = array(example["image"])
    example["poisoned"] = poisoned = in_share(image, share, seed, "trigger")
    if not poisoned:
        return example
    height, width, channels = image.shape
    if size > min(height, width):
        raise UserError(f"op `trigger`: a patch of {size} on a picture of {height}x{width}; a smaller size?")
    rng = _draw(image, seed)
    top, left = rng.integers(height - size + 1), rng.integers(width - size + 1)
    image = image.copy()
    patch = np.random.default_rng(seed).integers(256, size=(size, size, channels), dtype=np.uint8)
    image[top : top + size, left : left + size] = patch
    example["image"] = image
    if target is not None:
        if "text" not in example:
            raise UserError("op `trigger` replaces `text`, which no op before has made; put `caption(...)` first")
        example["text"] = target
    return example
