"""Converts checkpoints between projects, and says what a file is.

    python -m vlm_jax.convert SRC DST --format=hf|open_clip|big_vision|t5x|native
    python -m vlm_jax.convert --inspect SRC

SRC is whatever `vlm_jax.load` takes; DST a folder to make, or an .npz for big_vision. Nothing is executed, one tensor
is in memory at a time, and the arrays arrive bit for bit. What a format has no words for is an error.
"""

import dataclasses
import fnmatch
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from vlm_jax import command
from vlm_jax.errors import UserError
from vlm_jax.zoo import formats, hub, key_map, save


def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    format: str = "native",
    *,
    preprocess: str | None = None,
    tokenizer: str | None = None,
    tokenize: str | None = None,
    activation: str | None = None,
    image_size: Sequence[int] | None = None,
) -> None:
    """Writes the checkpoint `source` to `destination` in another format.

    Args:
      source: "hf:org/name", a folder or a file.
      destination: a folder to make, or an .npz file for "big_vision".
      format: a key of `zoo.save.WRITERS`.
      preprocess, tokenizer, tokenize, activation: as for `vlm_jax.load`, where the files do not tell; without them the
        result does not tell either.
      image_size: (height, width) in pixels, of files whose position table does not tell.
    """
    released = formats.understand(hub.local(source), activation)
    given = dict(preprocess=preprocess, tokenizer=tokenizer, tokenize=tokenize)
    released = dataclasses.replace(released, **{key: value for key, value in given.items() if value is not None})
    if image_size is not None:
        released = released.with_image_size(tuple(image_size))
    save.write(save.content_of(released), destination, format)


def inspect(source: str | os.PathLike, activation: str | None = None) -> str:
    """What a checkpoint is, as text: format, model, preprocessing, tokenizer, licence, and where every tensor goes."""
    released = formats.understand(hub.local(source), activation)
    goes: dict[str, list[str]] = {}
    for entry in released.entries:
        if key_map.array_shape(entry.ours, released.shapes) is not None:
            part = f" {entry.part[0] + 1}/{entry.part[1]}" if entry.part[1] > 1 else ""
            goes.setdefault(entry.theirs, []).append(entry.ours + part)
    rows = [("tensor", "shape", "dtype", "parameter")]
    for name, tensor in released.tensors.items():
        if name in goes:
            where = goes[name][0] if len(goes[name]) == 1 else f"{goes[name][0]} ... {goes[name][-1]}"
        else:
            ignored = any(fnmatch.fnmatchcase(name, pattern) for pattern in released.ignored)
            where = "(left out)" if ignored else "(NOTHING TAKES IT)"
        rows.append((name, "x".join(map(str, tensor.shape)) or "scalar", str(tensor.dtype), where))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    count = sum(math.prod(leaf.shape) for leaf in released.shapes.values())
    unknown = "unknown: pass {0}= to load"
    parts = {"image": "image tower", "text": "text tower", "encoder": "encoder", "decoder": "decoder"}
    facts = {
        "file": released.path,
        "format": released.format,
        "parameters": f"{count:,}",
        **{part: _spell(released.model[side]) for side, part in parts.items() if side in released.model},
        "preprocess": released.preprocess or (unknown.format("preprocess") if released.model.get("image") else "none"),
        "tokenizer": released.tokenizer
        or (unknown.format("tokenizer") if formats.of_texts(released.model) else "none"),
        "tokenize": released.tokenize or (unknown.format("tokenize") if formats.of_texts(released.model) else "none"),
        "licence": released.licence or "not stated",
    }
    width = max(map(len, facts))
    text = "\n".join([*(f"{key.ljust(width)}  {value}" for key, value in facts.items()), "", *lines])
    try:
        released.match()
    except UserError as error:
        text += f"\n\n{error}"
    return text


def _spell(section: Mapping[str, Any] | None) -> str:
    return "none" if section is None else ", ".join(f"{key}={json.dumps(value)}" for key, value in section.items())


def _pixels(sides: Sequence[str]) -> list[int]:
    if len(sides) != 2 or not all(side.isdecimal() for side in sides):
        raise UserError(f"--image_size={','.join(sides)} cannot be read; expected height,width in pixels")
    return [int(side) for side in sides]


def main(argv: Sequence[str]) -> None:
    if _INSPECT.value:
        if len(argv) != 2:
            raise UserError("expected one checkpoint: vlm-jax convert --inspect SRC")
        print(inspect(argv[1], _ACTIVATION.value))
        return
    if len(argv) != 3:
        raise UserError("expected a source and a destination: vlm-jax convert SRC DST --format=native")
    convert(
        argv[1],
        argv[2],
        _FORMAT.value,
        preprocess=_PREPROCESS.value,
        tokenizer=_TOKENIZER.value,
        tokenize=_TOKENIZE.value,
        activation=_ACTIVATION.value,
        image_size=_pixels(_IMAGE_SIZE.value) if _IMAGE_SIZE.value else None,
    )
    print(f"wrote {argv[2]}")


_INSPECT = flags.DEFINE_bool("inspect", False, "Print what SRC is, and convert nothing")
_FORMAT = flags.DEFINE_enum("format", "native", list(save.WRITERS), "Layout to write")
_PREPROCESS = flags.DEFINE_string("preprocess", None, "Op string for pictures, where the files do not tell")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Tokenizer spec, where the files hold none")
_TOKENIZE = flags.DEFINE_string("tokenize", None, "Op string for texts, where the files do not tell")
_ACTIVATION = flags.DEFINE_string(
    "activation", None, "Of bare CLIP weights (quick_gelu, gelu) and T5X (gelu_tanh, silu)"
)
_IMAGE_SIZE = flags.DEFINE_list("image_size", [], "Height,width in pixels, where the files do not tell")

if __name__ == "__main__":
    command.run(main)
