"""Preprocessing as a string of ops: written, and rewritten for another size or for training."""

import dataclasses
import inspect

import numpy as np

from vlm_jax.data import ops
from vlm_jax.errors import UserError

Size = int | tuple[int, int]  # a side, or (height, width)


def call(name: str, *args, **kwargs) -> str:
    """Returns `name(args, key=value)`, without default values."""
    defaults = inspect.signature(ops.OPS[name]).parameters
    stated = [f"{key}={value!r}" for key, value in kwargs.items() if value != defaults[key].default]
    arguments = [*map(repr, args), *stated]
    return f"{name}({', '.join(arguments)})" if arguments else name


def sides(size: Size) -> tuple[int, ...]:
    """(side,) of a square, else (height, width)."""
    height, width = np.broadcast_to(size, 2).tolist()
    return (height,) if height == width else (height, width)


def resized(string: str, size: Size) -> str:
    """Returns the op string with its sizes scaled, so that pictures come out at `size`.

    The last op with a size tells the old one: with size=112, "resize_shortest(256) | central_crop(224)" becomes
    "resize_shortest(128) | central_crop(112)". Sides are rounded down.

    Raises:
      UserError: no op has a size, or one has a budget of patches.
    """
    pipeline = ops.parse(string)
    steps = [*pipeline.before, *pipeline.after]
    sized = [step for step in steps if {"size", "height"} & {*step.kwargs}]
    if not sized or any(step.name == "pack_patches" for step in steps):
        raise UserError(
            f"preprocess `{string}` has no size that can follow image_size={size}; pass preprocess= as well"
        )
    scale = np.divide(size, _size_of(sized[-1]))
    spelled = [_spelled(step, scale if step in sized else None) for step in steps]
    spelled[len(pipeline.before) : len(pipeline.before)] = ["cache"] * pipeline.cached
    return " | ".join(spelled)


def lengthened(string: str, length: int) -> str:
    """Returns the op string that makes token ids, for another number of tokens."""
    steps = ops.parse(string, tokenizer=len).after
    if not any(step.name == "tokenize" for step in steps):
        raise UserError(f"tokenize `{string}` has no `tokenize`, whose length can follow text_length; pass tokenize=")
    own = lambda step: {name: value for name, value in step.kwargs.items() if name not in ops.INJECTED}
    new = lambda step: own(step) | ({"length": length} if step.name == "tokenize" else {})
    return " | ".join(_spelled(dataclasses.replace(step, kwargs=new(step))) for step in steps)


def _size_of(step: ops.Step) -> np.ndarray:
    """(height, width) of an op with a size."""
    size, height, width = map(step.kwargs.get, ("size", "height", "width"))
    return np.broadcast_to(size or (height, width or height), 2)


def _spelled(step: ops.Step, scale: np.ndarray | None = None) -> str:
    """The op as text, with a scale of a scaled size."""
    own, names = dict(step.kwargs), inspect.signature(step.function).parameters
    first = next((name for name in names if name not in ops.INJECTED), "")
    args = (own.pop(first),) if first in own else ()
    if scale is not None:
        new = sides(np.floor(_size_of(step) * scale + 1e-6).astype(int))
        args = new if first == "height" or len(new) == 1 else (new,)
        own.pop("width", None)
    return call(step.name, *args, **own)


def augmented(string: str) -> str:
    """Returns the op string with a random crop in the place of its resizes and crops, for training.

    Packed patches and sizes that are no squares stay as they are.
    """
    pipeline = ops.parse(string)
    steps = [*pipeline.before, *pipeline.after]
    sized = [step for step in steps if {"size", "height"} & {*step.kwargs}]
    side = sides(_size_of(sized[-1])) if sized else ()
    if len(side) != 1 or any(step.name == "pack_patches" for step in steps):
        return string
    crop = call("random_resized_crop", *side)
    kept = [step for step in steps if step is sized[-1] or step not in sized]
    return " | ".join(crop if step is sized[-1] else _spelled(step) for step in kept)
