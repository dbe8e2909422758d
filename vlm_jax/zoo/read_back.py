"""A model to write, and what the layout would read back of it: losses are found before anything is written."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vlm_jax import models
from vlm_jax.errors import UserError
from vlm_jax.zoo import key_map
from vlm_jax.zoo.formats import t5, transformers
from vlm_jax.zoo.readers.tensors import Tensor
from vlm_jax.zoo.released import SIDES

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
# Fields that change how a model runs or starts, not its outputs.
RUNTIME = (
    "scan", "remat", "implementation", "dtype", "dropout", "drop_path", "embed_std", "any_size", "parent", "name",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Content:
    """A model to write.

    Attributes:
      section: config section of the model.
      shapes: parameter name -> anything with a shape.
      read: parameter name, index (a slice for each axis) -> float32 array.
      preprocess, tokenizer, tokenize: as in a config; None where unknown.
      licence: of the weights, if known.
      dtype: of the written arrays, a key of `DTYPES`.
      adapter: writes the adapter's file of an adapted model; only "native" has a place for it.
      low_rank: this content -> the function that writes the adapted model's folder of PEFT, see `peft.writer`.
    """

    section: Mapping[str, Any]
    shapes: Mapping[str, Any]
    read: Callable[[str, tuple[slice, ...]], np.ndarray]
    preprocess: str | None = None
    tokenizer: str | None = None
    tokenize: str | None = None
    licence: str | None = None
    dtype: str = "float32"
    adapter: Callable[[Path], None] | None = None
    low_rank: Callable[["Content"], Callable[[Path], None]] | None = None

    def array(self, shape: tuple[int, ...], load: Callable[[tuple[slice, ...]], np.ndarray]) -> Tensor:
        """Returns an array to write, rounded to `dtype` when it is read."""
        return Tensor(shape, np.dtype(DTYPES[self.dtype]), load)


def full_section(content: Content) -> dict[str, Any]:
    """Returns the section with all fields of its towers, and an image size if the positions are a square."""
    model = models.build(content.section)
    section = {side: _fields(getattr(model, side, None)) for side in SIDES}
    section |= {key: getattr(model, key, None) for key in ("bias_init", "pad_id")}
    table = content.shapes.get("image/pos_embed")
    if section["image"] and table is not None and section["image"].get("image_size") is None:
        rows = table.shape[1] - section["image"]["cls_position"]
        side = math.isqrt(rows)
        if side * side == rows:
            section["image"]["image_size"] = side * section["image"]["patch"]
    return section


def _fields(tower) -> dict[str, Any] | None:
    if tower is None:
        return None
    return {field.name: getattr(tower, field.name) for field in dataclasses.fields(tower)}


def losses(content: Content, entries: list[key_map.Entry], describe: Callable) -> list[str]:
    """Lists losses: fields that the layout reads back differently, and parameters without a place."""
    placed = {entry.ours for entry in entries}
    homeless = [name for name in content.shapes if name.replace("blocks/", "blocks_0/") not in placed]
    if homeless:
        return [f"it has no place for {key_map.listed(homeless)}"]
    problems = []
    try:
        read_back = models.build(describe(their_arrays(content, entries)))
    except (UserError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        return [str(error)]
    wanted = full_section(content)
    for side in SIDES:
        got = _fields(getattr(read_back, side, None)) or {}
        want = wanted[side] or {}
        for key in want.keys() - set(RUNTIME):
            if not _same(key, got.get(key), want[key], want):
                problems.append(f"{side}.{key} would be {got.get(key)!r}, not {want[key]!r}")
    return sorted(problems)


def _same(key: str, got: Any, want: Any, fields: Mapping[str, Any]) -> bool:
    square = lambda size: (size, size) if isinstance(size, int) else tuple(size or ())
    if key == "image_size":
        return got is None or square(got) == square(want)
    if key == "layer_scale":  # only its presence counts; the initial value is for training
        return (got is None) == (want is None)
    if key == "head_bias" and not fields.get("out_dim"):
        return True
    if key in ("eos_id", "pad_id"):
        uses = fields.get("pool") == "eos" if key == "eos_id" else fields.get("pad_mask")
        return not uses or got == want
    if key == "cls":
        return bool(got or fields.get("pool") == "tok") == bool(want or fields.get("pool") == "tok")
    return got == want or (isinstance(want, tuple) and tuple(got or ()) == want)


def their_arrays(content: Content, entries: list[key_map.Entry]) -> dict[str, Tensor]:
    """Returns their name -> tensor, assembled from our parameters when read."""
    by_name: dict[str, list[key_map.Entry]] = {}
    for entry in entries:
        if key_map.array_shape(entry.ours, content.shapes) is not None:
            by_name.setdefault(entry.theirs, []).append(entry)

    def tensor(own: list[key_map.Entry]) -> Tensor:
        shape = own[0].their_shape(key_map.array_shape(own[0].ours, content.shapes))

        def load(index):
            whole = np.empty(shape, np.float32)
            for entry in own:
                name, i = key_map.blocks_of(entry.ours, content.shapes)
                rank = len(content.shapes[name].shape)
                if i is None:
                    entry.write(content.read(name, (slice(None),) * rank), whole)
                else:
                    row = content.read(name, (slice(i, i + 1), *(slice(None),) * (rank - 1)))
                    entry.write(row[0], whole)
            return whole[tuple(index)]

        return content.array(shape, load)

    return {name: tensor(own) for name, own in sorted(by_name.items())}


def transformers_layout(content: Content) -> tuple[dict, dict, list[key_map.Entry]]:
    """Returns (`full_section`, config.json, entries of the key table) of the model in Transformers.

    Raises:
      UserError: Transformers has no such model.
    """
    section, tried = full_section(content), []
    if section["encoder"]:
        outlines = [t5.outline(section)]
    else:
        section = of_towers(content, "Transformers")
        check_vit(section["image"], "Transformers'")
        outlines = transformers.outlines(section["image"], section["text"])
    pooling = section["text"]["pool"] if transformers.is_sentence_model(section) else None
    for config, entries in outlines:
        describe = lambda tensors, config=config: transformers.describe(
            config, {name: tensor.shape for name, tensor in tensors.items()}, pooling
        )
        problems = losses(content, entries, lambda tensors, describe=describe: describe(tensors)[0])
        tried.append((problems, config))
        packed = "pack_patches" in (content.preprocess or "")
        if not problems and (not packed or config["model_type"].startswith("siglip2")):
            return section, config, entries
    homeless = lambda problems: any(problem.startswith("it has no place") for problem in problems)
    problems, config = min(tried, key=lambda row: (homeless(row[0]), len(row[0])))
    nearest = config["architectures"][0]
    raise UserError(f"Transformers has no such model; nearest is {nearest}, but {', '.join(problems)}")


def of_towers(content: Content, format: str) -> dict[str, Any]:
    """Returns `full_section` of a model of towers; raises a UserError that names the format if it is a captioner."""
    section = full_section(content)
    if section["decoder"]:
        raise UserError(f"{format} has no such captioner")
    return section


def check_vit(image: Mapping[str, Any] | None, whose: str) -> None:
    """Raises a UserError if an image tower is convolutional, which `whose` format has no place for."""
    if image and "patch" not in image:
        raise UserError(f"{whose} format has no convolutional image tower, only Vision Transformers")
