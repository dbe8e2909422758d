"""`vlm_jax.save_pretrained`: a model of ours in the layout of another project, or in our own.

Every layout is checked before writing: the description read back from the planned tensors must be the model's own.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax import models
from vlm_jax.config import checked, choose
from vlm_jax.data import tokenizers
from vlm_jax.data.files import naming, write_json
from vlm_jax.errors import UserError
from vlm_jax.params.table import named_leaves
from vlm_jax.pretrained import Pretrained
from vlm_jax.zoo import adapters, key_map, open_clip_tokenizers, preprocessing, recognize, tokenizer_files
from vlm_jax.zoo.formats import big_vision, open_clip, t5, t5x, transformers
from vlm_jax.zoo.readers.tensors import Tensor, write_npz, write_safetensors
from vlm_jax.zoo.released import SIDES, Released, Told
from vlm_jax.zoo.shapes import towers_alone

log = logging.getLogger(__name__)
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
      adapter: writes the adapter's file of an adapted model; only "native" has a place for it.
    """

    section: Mapping[str, Any]
    shapes: Mapping[str, Any]
    read: Callable[[str, tuple[slice, ...]], np.ndarray]
    preprocess: str | None = None
    tokenizer: str | None = None
    tokenize: str | None = None
    licence: str | None = None
    adapter: Callable[[Path], None] | None = None


@checked
def save_pretrained(pretrained: Pretrained, path: str | os.PathLike, format: str = "native") -> None:
    """Writes a model with its preprocessing and tokenizer.

    Args:
      pretrained: the model.
      path: a folder to make ("native", "hf", "open_clip", "t5x"), or an .npz file ("big_vision").
      format: a key of `FORMATS`.

    The folder of an adapted model in the format "native" holds its adapter, too: `vlm_jax.load` returns it adapted.
    Other formats have no place for insertions and heads, and none for names of classes, which a warning says.

    Raises:
      UserError: the format cannot express the model, or `path` exists.
    """
    if not isinstance(pretrained, Pretrained):
        raise UserError(
            f"save_pretrained takes (model, path); got ({type(pretrained).__name__}, {type(path).__name__})"
        )
    base, adapted = pretrained, None
    if pretrained.classes or pretrained.head or hasattr(pretrained.model, "insertions"):
        base, adapted = adapters.without(pretrained), pretrained
        if format != "native":
            _refuse_adapted(adapted, format)
    leaves = named_leaves(base.params)
    config = pretrained.config
    write(
        Content(
            section={key: value for key, value in config["model"].items() if adapted is None or key != "insertions"},
            shapes=leaves,
            read=lambda name, index: np.asarray(leaves[name][index], np.float32),
            preprocess=pretrained.preprocess,
            tokenizer=config.get("tokenizer"),
            tokenize=base.tokenize,
            licence=config.get("licence"),
            adapter=adapted and (lambda file: adapters.save_adapter(file, base, adapted)),
        ),
        path,
        format,
    )


def _refuse_adapted(adapted: Pretrained, format: str) -> None:
    modules = [type(module).__name__ for module in getattr(adapted.model, "insertions", ())]
    if adapted.head is not None:
        modules.append(f"the head {type(adapted.head).__name__}")
    if modules:
        advice = " (or merge LowRank by `insertion.merge`)" if "LowRank" in modules else ""
        raise UserError(
            f"{format} has no place for {', '.join(modules)} of this adapted model: write it as native{advice}"
        )
    log.warning("%s has no place for the model's %d classes; give them to `classify`", format, len(adapted.classes))


def content_of(released: Released) -> Content:
    """Returns the content of a checkpoint, with unread tensors."""
    plan = released.match()
    return Content(
        section=released.model,
        shapes=released.shapes,
        read=lambda name, index: key_map.read(
            name, plan[name], released.tensors, released.shapes[name].shape, index
        ),
        preprocess=released.preprocess,
        tokenizer=released.tokenizer,
        tokenize=released.tokenize,
        licence=released.licence,
    )  # fmt: skip


def write(content: Content, path: str | os.PathLike, format: str) -> None:
    """Writes `content`; a failure removes the partial files."""
    path = Path(path).expanduser()
    if path.exists():
        raise UserError(f"{path} exists; remove it or write elsewhere")
    writer = choose(FORMATS, format, "--format")
    if format != "native" and content.section.get("name") == "two_tower_captioner":
        log.warning("%s has no place for the decoder: the two towers are written, as SigLIP 2 is released", format)
        content = dataclasses.replace(content, **towers_alone(content.section, content.shapes))
    try:
        writes = writer(content)
    except UserError as error:
        raise UserError(f"{error}; it can be written as {', '.join(formats(content))}") from None
    if format == "big_vision":
        return writes(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); give another path") from None
    try:
        with naming(partial):
            writes(partial)
        os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def formats(content: Content) -> list[str]:
    """Returns the names of the formats that can express the model."""
    able = []
    for format, writer in FORMATS.items():
        with contextlib.suppress(UserError):
            writer(content)
            able.append(format)
    return able


def _native(content: Content) -> Callable[[Path], None]:
    arrays = {
        name: Tensor(tuple(leaf.shape), np.dtype(np.float32), lambda index, name=name: content.read(name, index))
        for name, leaf in content.shapes.items()
    }

    def write(folder: Path) -> None:
        write_safetensors(folder / recognize.PARAMS, arrays, {"format": "vlm_jax"})
        tokenizer = tokenizer_files.copy(content.tokenizer, folder) if content.tokenizer else None
        settings = dict(model=dict(content.section), preprocess=content.preprocess, tokenizer=tokenizer)
        write_json(folder / "config.json", settings | dict(tokenize=content.tokenize, licence=content.licence))
        if content.adapter:
            content.adapter(folder / adapters.FILE)

    return write


def _transformers(content: Content) -> Callable[[Path], None]:
    section, tried = full_section(content), []
    if section["encoder"]:
        outlines = [t5.outline(section)]
    else:
        section = _of_towers(content, "Transformers")
        outlines = transformers.outlines(section["image"], section["text"])
    for config, entries in outlines:
        pooling = (section["text"] or {}).get("pool") if _is_sentence_model(section) else None
        describe = lambda tensors, config=config, pooling=pooling: transformers.describe(
            config, {name: tensor.shape for name, tensor in tensors.items()}, pooling
        )
        problems = _problems(content, entries, lambda tensors, describe=describe: describe(tensors)[0])
        tried.append((problems, config))
        packed = "pack_patches" in (content.preprocess or "")
        if not problems and (not packed or config["model_type"].startswith("siglip2")):
            break
    else:
        homeless = lambda problems: any(problem.startswith("it has no place") for problem in problems)
        problems, config = min(tried, key=lambda row: (homeless(row[0]), len(row[0])))
        nearest = config["architectures"][0]
        raise UserError(f"Transformers has no such model; nearest is {nearest}, but {', '.join(problems)}")
    preprocess = content.preprocess and preprocessing.to_transformers(content.preprocess)

    def write(folder: Path) -> None:
        if preprocess:
            write_json(folder / "preprocessor_config.json", preprocess)
        if content.tokenizer:
            tokenizer_files.to_transformers(content.tokenizer, content.tokenize, folder)
            if "eos_token_id" in config and section["encoder"]:
                config["eos_token_id"] = tokenizers.build(content.tokenizer).eos_id
        write_json(folder / "config.json", config)
        if pooling:
            _write_sentence_modules(folder, pooling, section["text"]["width"])
        write_safetensors(folder / "model.safetensors", _their_arrays(content, entries), {"format": "pt"})

    return write


def _of_towers(content: Content, format: str) -> dict[str, Any]:
    section = full_section(content)
    if section["decoder"]:
        raise UserError(f"{format} has no such captioner")
    return section


def _is_sentence_model(section) -> bool:
    """Whether a BERT pools as in sentence-transformers; Transformers' own pool is dense, on the first token."""
    text = section["text"]
    return bool(text and not section["image"] and text["post_norm"] and not text["rep_dim"])


def _write_sentence_modules(folder: Path, pool: str, width: int) -> None:
    kinds = {"0": ("", "Transformer"), "1": ("1_Pooling", "Pooling"), "2": ("2_Normalize", "Normalize")}
    modules = [
        dict(idx=int(i), name=i, path=path, type=f"sentence_transformers.models.{kind}")
        for i, (path, kind) in kinds.items()
    ]
    (folder / "modules.json").write_text(json.dumps(modules, indent=2))
    (folder / "1_Pooling").mkdir()
    mode = {"mean": "mean_tokens", "first": "cls_token", "max": "max_tokens"}[pool]
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, f"pooling_mode_{mode}": True})


def _open_clip(content: Content) -> Callable[[Path], None]:
    section = _of_towers(content, "open_clip")
    cfg, entries = open_clip.outline(section)
    if problems := _problems(content, entries, lambda tensors: open_clip.describe(tensors, cfg)[0]):
        raise UserError(f"open_clip has no such model: {', '.join(problems)}")
    settings = {"model_cfg": cfg, "preprocess_cfg": {}}
    if content.preprocess:
        settings["preprocess_cfg"] = preprocessing.to_open_clip(content.preprocess)

    def write(folder: Path) -> None:
        if content.tokenizer and content.tokenizer != "clip":
            cfg["text_cfg"]["hf_tokenizer_name"] = "."
            clean = open_clip_tokenizers.cleaning(content.tokenize, tokenizers.build(content.tokenizer))
            cfg["text_cfg"]["tokenizer_kwargs"] = {"clean": clean}
            tokenizer_files.to_transformers(content.tokenizer, content.tokenize, folder)
        write_json(folder / "open_clip_config.json", settings)
        write_safetensors(folder / "open_clip_model.safetensors", _their_arrays(content, entries), {"format": "pt"})

    return write


def _big_vision(content: Content) -> Callable[[Path], None]:
    section = full_section(content)
    if section["decoder"] and not section["image"]:
        raise UserError("big_vision's format is of models with images; this one has none")
    entries = big_vision.outline(section)
    if problems := _problems(content, entries, lambda tensors: big_vision.describe(tensors, _pools(section))[0]):
        raise UserError(f"big_vision has no such model: {', '.join(problems)}")
    arrays = _their_arrays(content, entries)
    return lambda path: write_npz(path, {f"params/{name}": array for name, array in arrays.items()})


def _pools(section: Mapping[str, Any]) -> Told:
    """The pools, which an npz does not hold."""
    pools = {side: section[side]["pool"] for side in ("image", "text") if section[side]}
    for side, pool in pools.items():
        if pool not in ("map", "tok", "none"):
            log.info(
                "an npz does not hold the %s tower's pool; `load` needs pool=%r, unless its name tells", side, pool
            )
    return Told(pool=pools)


def _t5x(content: Content) -> Callable[[Path], None]:
    section = full_section(content)
    if not section["encoder"]:
        raise UserError("T5X's format is of T5 and UL2, from texts to texts")
    entries, activation = t5x.table(section), section["encoder"]["activation"]
    if problems := _problems(content, entries, lambda tensors: t5x.describe(tensors, activation)[0]):
        raise UserError(f"T5X has no such model: {', '.join(problems)}")
    return lambda folder: t5x.write(folder, _their_arrays(content, entries))


# Each checks that the format can express the content, and returns the function that writes a folder or file.
FORMATS = {
    "native": _native,
    "hf": _transformers,
    "open_clip": _open_clip,
    "big_vision": _big_vision,
    "t5x": _t5x,
}


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


def _problems(content: Content, entries: list[key_map.Entry], describe: Callable) -> list[str]:
    """Lists losses: fields that the layout reads back differently, and parameters without a place."""
    placed = {entry.ours for entry in entries}
    homeless = [name for name in content.shapes if name.replace("blocks/", "blocks_0/") not in placed]
    if homeless:
        return [f"it has no place for {key_map.listed(homeless)}"]
    problems = []
    try:
        read_back = models.build(describe(_their_arrays(content, entries)))
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


def _their_arrays(content: Content, entries: list[key_map.Entry]) -> dict[str, Tensor]:
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

        return Tensor(shape, np.dtype(np.float32), load)

    return {name: tensor(own) for name, own in sorted(by_name.items())}
