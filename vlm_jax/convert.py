"""Converts checkpoints between projects, or describes a checkpoint.

    vlm-jax convert --inspect pkg:vlm_jax/zoo/clip_tiny
    vlm-jax convert pkg:vlm_jax/zoo/clip_tiny runs/emoji_clip --format=native

SRC is any checkpoint that `vlm_jax.load` reads. DST is a new folder, or an .npz file for big_vision. Conversion runs no
code of the checkpoint, holds one tensor at a time in memory and keeps every bit, unless `--dtype=bfloat16` rounds. A
model that the format cannot express is an error.
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
from vlm_jax.command.values import given
from vlm_jax.errors import UserError
from vlm_jax.zoo import adapters, hub, key_map, model_card, recognize, save
from vlm_jax.zoo.load import load
from vlm_jax.zoo.released import Released, of_texts

SOURCE = ("activation", "pool", "heads", "weights", "image_size")  # flags that say what the source is


def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    format: str = "native",
    *,
    preprocess: str | None = None,
    tokenizer: str | None = None,
    tokenize: str | None = None,
    activation: str | None = None,
    pool: str | None = None,
    heads: int | None = None,
    weights: str | None = None,
    image_size: Sequence[int] | None = None,
    adapter: str | os.PathLike | None = None,
    dtype: str = "float32",
    show: bool = False,
) -> None:
    """Writes the checkpoint `source` to `destination` in another format.

    Args:
      source: "hf:org/name", a folder or a file.
      destination: a new folder, an .npz file for "big_vision", or "hf:org/name" of a repository, see `push_to_hub`.
      format: a key of `zoo.save.FORMATS`.
      preprocess, tokenizer, tokenize, activation, pool, heads, weights: as for `vlm_jax.load`, for files without this
        information; without these arguments the result lacks it too.
      image_size: (height, width) in pixels, for files whose position table does not determine it.
      adapter: file of an adapted model; the result is the adapted model, see `save.save_pretrained`.
      dtype: of the weights in the file: "float32" or "bfloat16", half the size.
      show: shows a progress bar.
    """
    if os.fspath(destination).startswith("hf:"):
        given = {name: value for name, value in locals().items() if name not in ("source", "destination")}
        with hub.uploading(os.fspath(destination).removeprefix("hf:")) as folder:
            return convert(source, folder, **given)
    told = dict(activation=activation, pool=pool, heads=heads, weights=weights)
    if adapter or adapters.of_folder(hub.local(source)):
        own = dict(preprocess=preprocess, tokenizer=tokenizer, tokenize=tokenize)
        return save.save_pretrained(load(source, adapter=adapter, **own, **told), destination, format, dtype=dtype)
    released = _understood(source, image_size, **told)
    own = dict(preprocess=preprocess, tokenizer=tokenizer, tokenize=tokenize)
    released = dataclasses.replace(released, **{key: value for key, value in own.items() if value is not None})
    content, seen = save.content_of(released), set()
    total = sum(4 * math.prod(leaf.shape) for leaf in content.shapes.values())
    with command.bar(total=total, desc="convert", unit="B", unit_scale=True, disable=not show) as bar:

        def read(name, index):
            array = content.read(name, index)
            if (name, str(index)) not in seen:  # a tensor with several parts is read once for each part
                seen.add((name, str(index)))
                bar.update(array.nbytes)
            return array

        save.write(dataclasses.replace(content, read=read, dtype=dtype), destination, format)


def describe(source: str | os.PathLike, image_size: Sequence[int] | None = None, **told: Any) -> dict[str, Any]:
    """Describes a checkpoint: format, model, preprocessing, tokenizer, licence, and where every tensor goes.

    The result is JSON-able. Values that are absent or unknown are None. `problem` says why the checkpoint cannot be
    loaded. Arguments as for `convert`; `told`: activation, pool, heads, weights.
    """
    released = _understood(source, image_size, **told)
    goes: dict[str, list[str]] = {}
    for entry in released.entries:
        if key_map.array_shape(entry.ours, released.shapes) is not None:
            part = f" {entry.part[0] + 1}/{entry.part[1]}" if entry.part[1] > 1 else ""
            goes.setdefault(entry.theirs, []).append(entry.ours + part)
    tensors = []
    for name, tensor in released.tensors.items():
        ignored = any(fnmatch.fnmatchcase(name, pattern) for pattern in released.ignored)
        tensors.append(
            {
                "name": name,
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype),
                "parameters": goes.get(name, []),
                "ignored": ignored and name not in goes,
            }
        )
    problem = None
    try:
        released.match()
    except UserError as error:
        problem = str(error)
    return {
        "file": str(released.path),
        "format": released.format,
        "parameters": sum(math.prod(leaf.shape) for leaf in released.shapes.values()),
        "model": released.model,
        "preprocess": released.preprocess,
        "tokenizer": released.tokenizer,
        "tokenize": released.tokenize,
        "licence": released.licence,
        "problem": problem,
        "tensors": tensors,
    }


def _understood(source: str | os.PathLike, image_size: Sequence[int] | None, **told: Any) -> Released:
    released = recognize.of_spec(source, **told)
    return released if image_size is None else released.with_image_size(tuple(image_size))


def text(about: Mapping[str, Any]) -> str:
    """Returns the result of `describe` as text."""
    model, unknown = about["model"], "unknown: pass {0}= to load"
    sides = {"preprocess": model.get("image"), **dict.fromkeys(("tokenizer", "tokenize"), of_texts(model))}
    facts = {
        "file": about["file"],
        "format": about["format"],
        "parameters": f"{about['parameters']:,}",
        **{part: _spell(model[side]) for side, part in model_card.PARTS.items() if side in model},
        **{key: about[key] or (unknown.format(key) if side else "none") for key, side in sides.items()},
        "licence": about["licence"] or "not stated",
    }
    rows = [("tensor", "shape", "dtype", "parameter")]
    for tensor in about["tensors"]:
        goes = tensor["parameters"]
        where = " ... ".join(dict.fromkeys([*goes[:1], *goes[-1:]]))
        where = where or ("(left out)" if tensor["ignored"] else "(NOTHING TAKES IT)")
        rows.append((tensor["name"], "x".join(map(str, tensor["shape"])) or "scalar", tensor["dtype"], where))
    blocks = [command.table(list(facts.items()), left=2), command.table(rows, left=4), about["problem"]]
    return "\n\n".join(filter(None, blocks))


def _spell(section: Mapping[str, Any] | None) -> str:
    return "none" if section is None else ", ".join(f"{key}={json.dumps(value)}" for key, value in section.items())


def main(argv: Sequence[str], values: flags.FlagValues) -> command.Answer:
    sources = given(values, (*SOURCE, "preprocess", "tokenizer", "tokenize", "adapter"))
    if values.inspect:
        if len(argv) != 2:
            raise UserError("expected one checkpoint: vlm-jax convert --inspect SRC")
        told = {key: sources.pop(key) for key in SOURCE if key in sources}
        if unused := [f"--{key}" for key in (*sources, "format") if values[key].present]:
            raise UserError(f"--inspect only says what SRC is, and takes no {', '.join(unused)}")
        with command.doing(f"reading {argv[1]}"):
            about = describe(argv[1], **told)
        return command.Answer(about, text(about))
    if len(argv) != 3:
        raise UserError("expected a source and a destination: vlm-jax convert SRC DST --format=native")
    with command.doing(f"reading {argv[1]}"):
        convert(argv[1], argv[2], values.format, **sources, dtype=values.dtype, show=True)
    return command.Answer({"wrote": argv[2], "format": values.format}, f"wrote {argv[2]}")


if __name__ == "__main__":
    command.run("convert", main)
