"""Pictures and texts as people hold them."""

import dataclasses
import functools
import inspect
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from PIL import Image

from vlm_jax import config
from vlm_jax.data import class_lists
from vlm_jax.errors import UserError
from vlm_jax.models import vocabulary

log = logging.getLogger(__name__)
KINDS = "a PIL image, a path, encoded bytes, an open binary file, or an array [H, W], [H, W, C] or [C, H, W]"
CHANNELS = (1, 3, 4)
# methods that take preprocessed batches -> the method for pictures (or texts) as people hold them
OF_BATCHES = {
    "embed_image_batch": "`embed_images`",
    "embed_text_batch": "`embed_texts`",
    "image_feature_batch": "`image_features`",
    "class_logits": "`classify`",
    "caption_logits": "`logits`",
    "caption_batch": "`caption` or `generate`",
    "score_batch": "`score`",
}


@dataclasses.dataclass(frozen=True)
class Lacks:
    """What a model's files do not tell.

    Attributes:
      where: the file.
      why: "preprocess", "tokenizer", "tokenize" -> why it is not known, and the argument to pass.
    """

    where: str = ""
    why: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def check(self, *names: str) -> None:
        """Raises a UserError if one of `names` is not known; of all without names."""
        if missing := [why for name, why in self.why.items() if not names or name in names]:
            raise UserError(f"{self.where}: {'; '.join(missing)}")


def pictures(images: Any) -> list[Any]:
    """Returns every picture as the op `decode` takes it: encoded bytes, a PIL image, or uint8 [H, W, 3].

    Args:
      images: a picture, or an iterable of pictures. A picture is a PIL image, a path (`~` is the home folder), encoded
        bytes, an open binary file, or an array of NumPy, JAX or torch: [H, W] (grey), [H, W, C] or [C, H, W] with 1, 3
        or 4 channels. An array with four axes holds several pictures. Arrays are uint8, uint16 (65,535 is white), bool,
        other integers from 0 to 255, or floats from 0 to 1. If any float of the call is above 1, floats are taken to
        be from 0 to 255, and a warning says so.

    Raises:
      UserError: something is no picture, a file cannot be read, the order of an array's axes is ambiguous, or its
        values are of another range (pictures that are normalised already go to `embed_image_batch`).
    """
    several = _pictures(images)
    name = lambda i: f"picture {i} of {len(several)}"
    read = [_read(image, name(i)) for i, image in enumerate(several)]
    floats = [x for x in read if isinstance(x, np.ndarray) and np.issubdtype(x.dtype, np.floating) and x.size]
    white = 255 if any(np.max(x) > 1 for x in floats) else 1
    if white == 255:
        log.warning("floats above 1 are among the pictures: floats are taken to be from 0 to 255, not from 0 to 1")
    return [_levels(x, white, name(i)) if isinstance(x, np.ndarray) else x for i, x in enumerate(read)]


def texts(values: Any) -> list[str]:
    """Returns a text, or an iterable of texts, as a list of str; raises UserError if something is no str."""
    several = _listed(values, "texts", "a str or a list of str") if not isinstance(values, str | bytes) else [values]
    for i, text in enumerate(several):
        if not isinstance(text, str):
            raise UserError(f"text {i} of {len(several)} is {_named(text)}; expected a str")
    return several


def labels(values: Any) -> list[str]:
    """Returns class names of a list of str, or of the name or file of a list, see `class_lists.read`.

    Raises:
      UserError: the labels are another str, whose letters are no names, or something is no str.
    """
    if not isinstance(values, str):
        return texts(values)
    known = values in class_lists.packaged("classes") or values.startswith("emoji:")
    if known or values.endswith((".txt", ".json")):
        return list(class_lists.read(values).values())
    raise UserError(f"labels is the str `{values:.60}`; give a list: [{values!r:.60}, ...]")


def checked(cls: type) -> type:
    """Decorates a class: its public methods refuse unknown arguments, those of `OF_BATCHES` what is no batch."""
    for name, method in list(vars(cls).items()):
        if inspect.isfunction(method) and not name.startswith("_"):
            setattr(cls, name, config.checked(_of_batch(method) if name in OF_BATCHES else method))
    return cls


def _of_batch(method: Callable) -> Callable:
    @functools.wraps(method)
    def on_arrays(self, images, *args, **kwargs):
        leaves = jax.tree.leaves(images, is_leaf=lambda x: isinstance(x, list) or x is None)
        if not leaves or not all(_is_array(x) and np.ndim(x) and len(x) and x.dtype.kind not in "OSU" for x in leaves):
            seen = f"an array {images.dtype} {list(images.shape)}" if _is_array(images) else _named(images)
            takes, rest = "preprocessed arrays [B, ...], the pictures are", "paths, PIL images and the like go to"
            if method.__name__ == "embed_text_batch":
                takes, rest = "token ids [B, L], given is", "texts go to"
            raise UserError(f"`{method.__name__}` takes {takes} {seen}; {rest} {OF_BATCHES[method.__name__]}")
        return method(self, images, *args, **kwargs)

    return on_arrays


def known_ids(model: nn.Module, tokenizer: Any, token_ids: np.ndarray) -> np.ndarray:
    """Returns token ids, int [n, L]; raises UserError if the model's vocabulary lacks one."""
    where = f"tokenizer `{getattr(tokenizer, 'spec', None)}`"
    vocabulary.check_ids({"token_ids": token_ids}, vocabulary.vocab_size(model), where)
    return token_ids


def cut(token_ids: np.ndarray, is_text: np.ndarray) -> np.ndarray:
    """Returns int [n, L] without the padding common to all rows, of few lengths: padding costs as much as tokens."""
    longest = int(np.max(np.nonzero(is_text)[1], initial=0)) + 1
    return token_ids[:, : max(1 << (longest - 1).bit_length(), 8)]


def _pictures(images: Any) -> list:
    if isinstance(images, str | os.PathLike | bytes | bytearray | memoryview | Image.Image) or hasattr(images, "read"):
        return [images]
    if _is_array(images) and np.ndim(images) in (2, 3) and np.asarray(images).dtype != object:
        return [images]
    return _listed(images, "pictures", f"{KINDS}, or several of these")


def _listed(values: Any, what: str, expected: str) -> list:
    if isinstance(values, Mapping) or not isinstance(values, Iterable) or (_is_array(values) and np.ndim(values) == 0):
        raise UserError(f"the {what} are {_named(values)}; expected {expected}")
    return list(values)


def _read(image: Any, name: str) -> Any:
    """A PIL image, encoded bytes, or an array [H, W, C] of any dtype."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        return _file(os.fspath(image), name)
    if hasattr(image, "read"):
        try:
            data = image.read()
        except (OSError, ValueError) as error:  # closed, or opened for writing
            raise UserError(f"{name} is a file that cannot be read: {error}") from None
        if not isinstance(data, bytes):
            raise UserError(f"{name} is a file opened as text; open it with mode 'rb'")
        return data
    if not _is_array(image):
        raise UserError(f"{name} is {_named(image)}; expected {KINDS}")
    try:
        array = np.asarray(image)
        if array.dtype.name == "bfloat16":
            array = array.astype(np.float32)
        return _channels_last(array, name)
    except (RuntimeError, TypeError) as error:  # a torch tensor with gradients or on another device
        raise UserError(f"{name} cannot be read as an array: {error}") from None


def _file(path: str, name: str) -> bytes:
    if path.startswith(("http://", "https://")):
        raise UserError(f"{name} is the URL {path:.80}; download it first: nothing is fetched here")
    try:
        file = Path(path).expanduser() if path else Path()
        if file.exists() and not file.is_file():  # a pipe would be waited for
            raise UserError(f"{name} is no file: {path:.200}")
        return file.read_bytes()
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in the path; no home folder
        raise UserError(f"{name} cannot be read: {path:.200}: {getattr(error, 'strerror', None) or error}") from None


def _channels_last(array: np.ndarray, name: str) -> np.ndarray:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or not array.size or array.dtype.kind not in "buif":
        raise UserError(f"{name} is an array {array.dtype} {list(array.shape)}; expected {KINDS}")
    first, last = array.shape[0] in CHANNELS, array.shape[2] in CHANNELS
    if first and last and array.shape[0] != 1:
        raise UserError(
            f"{name} is an array {list(array.shape)}, which may be [H, W, C] or [C, H, W]; give a PIL image instead"
        )
    if not first and not last:
        raise UserError(f"{name} is an array {list(array.shape)}; expected 1, 3 or 4 channels, first or last")
    return array if last else array.transpose(1, 2, 0)


def _levels(array: np.ndarray, white: int, name: str) -> Any:
    """uint8 [H, W, 3], or a PIL image of one or four channels, of an array [H, W, C]."""
    low, high, finite = array.min(), array.max(), np.isfinite(array).all()
    if array.dtype == bool:
        array = array * np.uint8(255)
    elif array.dtype == np.uint16:
        array = np.rint(array / 257)
    elif array.dtype.kind == "f":
        array = np.rint(np.asarray(array, np.float64) * (255 / white))
    if array.dtype != np.uint8 and not (array.min() >= 0 and array.max() <= 255):  # NaN is neither
        seen = f"values from {low:g} to {high:g}" if finite else "values that are not finite"
        raise UserError(
            f"{name} has {seen}; give uint8, uint16 or floats from 0 to 1; pictures that are "
            "normalised already go to `embed_image_batch`"
        )
    array = np.ascontiguousarray(array, np.uint8)
    if array.shape[2] == 3:
        return array
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def _is_array(value: Any) -> bool:
    return hasattr(value, "__array__")


def _named(value: Any) -> str:
    """None, a number or the type, for a message."""
    small = value is None or isinstance(value, bool | int | float | np.number)
    return repr(value) if small else f"of type {type(value).__name__}"
