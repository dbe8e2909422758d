"""`vlm_jax.save_pretrained`: a model of ours in the layout of another project, or in our own.

Every layout is checked before writing: the description read back from the planned tensors must be the model's own.
"""

import contextlib
import dataclasses
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vlm_jax.config import checked, choose
from vlm_jax.data import tokenizers
from vlm_jax.data.files import naming, write_json
from vlm_jax.errors import UserError
from vlm_jax.params.table import named_leaves
from vlm_jax.pretrained import Pretrained
from vlm_jax.zoo import (
    adapters,
    hub,
    key_map,
    model_card,
    open_clip_tokenizers,
    peft,
    preprocessing,
    recognize,
    tokenizer_files,
)
from vlm_jax.zoo.formats import big_vision, open_clip, stablehlo, t5x, transformers
from vlm_jax.zoo.read_back import (
    DTYPES,
    Content,
    check_vit,
    full_section,
    losses,
    of_towers,
    their_arrays,
    transformers_layout,
)
from vlm_jax.zoo.readers.tensors import write_npz, write_safetensors
from vlm_jax.zoo.released import Released
from vlm_jax.zoo.shapes import towers_alone

log = logging.getLogger(__name__)


@checked
def save_pretrained(
    pretrained: Pretrained, path: str | os.PathLike, format: str = "native", *, dtype: str = "float32"
) -> None:
    """Writes a model with its preprocessing and tokenizer.

    Args:
      pretrained: the model.
      path: a folder to make ("native", "hf", "open_clip", "t5x", "stablehlo", "peft"), or an .npz file ("big_vision").
      format: a key of `FORMATS`; "peft" holds the low-rank updates alone, see `zoo.peft`.
      dtype: of the weights in the file: "float32" or "bfloat16", half the size.

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
        if format not in ("native", "peft"):
            _refuse_adapted(adapted, format)
    leaves = named_leaves(base.params)
    config = pretrained.config
    content = Content(
        section={key: value for key, value in config["model"].items() if adapted is None or key != "insertions"},
        shapes=leaves,
        read=lambda name, index: np.asarray(leaves[name][index], np.float32),
        preprocess=pretrained.preprocess,
        tokenizer=config.get("tokenizer"),
        tokenize=base.tokenize,
        licence=config.get("licence"),
        dtype=dtype,
        adapter=adapted and (lambda file: adapters.save_adapter(file, base, adapted)),
        low_rank=adapted and (lambda content: peft.writer(content, adapted)),
    )
    write(content, path, format)


@checked
def push_to_hub(
    pretrained: Pretrained, name: str, format: str = "native", *, dtype: str = "float32", private: bool = True
) -> None:
    """Writes a model to the Hugging Face hub as `save_pretrained` writes it to disk; `load("hf:" + name)` reads it.

    Needs `vlm_jax[hf]` and a token that may write (`hf auth login`). The files of another model in the repository go,
    in the same commit; a model card that is there stays.

    Args:
      pretrained: the model.
      name: "org/name" or "org/name@branch" of the repository, which is made if it is not there.
      format, dtype: as for `save_pretrained`.
      private: whether a new repository is private.

    Raises:
      UserError: the format cannot express the model, or the repository cannot be written.
    """
    with hub.uploading(name.removeprefix("hf:"), private) as folder:
        save_pretrained(pretrained, folder, format, dtype=dtype)


def _refuse_adapted(adapted: Pretrained, format: str) -> None:
    modules = [type(module).__name__ for module in getattr(adapted.model, "insertions", ())]
    if adapted.head is not None:
        modules.append(f"the head {type(adapted.head).__name__}")
    if modules:
        advice = " (or fold LowRank into the kernels by `adapters.merged`)" if "LowRank" in modules else ""
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
    choose(DTYPES, content.dtype, "--dtype")
    if format not in ("native", "stablehlo") and content.section.get("name") == "two_tower_captioner":
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
            if format in model_card.LIBRARIES:
                (partial / "README.md").write_text(model_card.text(content, format), encoding="utf-8")
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
        name: content.array(tuple(leaf.shape), lambda index, name=name: content.read(name, index))
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
    section, config, entries = transformers_layout(content)
    preprocess = content.preprocess and preprocessing.to_transformers(content.preprocess)

    def write(folder: Path) -> None:
        if preprocess:
            write_json(folder / "preprocessor_config.json", preprocess)
        if content.tokenizer:
            tokenizer_files.to_transformers(content.tokenizer, content.tokenize, folder)
            if "eos_token_id" in config and section["encoder"]:
                config["eos_token_id"] = tokenizers.build(content.tokenizer).eos_id
        write_json(folder / "config.json", config)
        if transformers.is_sentence_model(section):
            transformers.write_sentence_modules(folder, section["text"]["pool"], section["text"]["width"])
        write_safetensors(folder / "model.safetensors", their_arrays(content, entries), {"format": "pt"})

    return write


def _open_clip(content: Content) -> Callable[[Path], None]:
    section = of_towers(content, "open_clip")
    cfg, entries = open_clip.outline(section)
    if problems := losses(content, entries, lambda tensors: open_clip.describe(tensors, cfg)[0]):
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
        write_safetensors(folder / "open_clip_model.safetensors", their_arrays(content, entries), {"format": "pt"})

    return write


def _big_vision(content: Content) -> Callable[[Path], None]:
    section = full_section(content)
    if section["decoder"] and not section["image"]:
        raise UserError("big_vision's format is of models with images; this one has none")
    check_vit(section["image"], "big_vision's")
    entries, pools = big_vision.outline(section), big_vision.pools(section)
    if problems := losses(content, entries, lambda tensors: big_vision.describe(tensors, pools)[0]):
        raise UserError(f"big_vision has no such model: {', '.join(problems)}")
    arrays = their_arrays(content, entries)
    return lambda path: write_npz(path, {f"params/{name}": array for name, array in arrays.items()})


def _t5x(content: Content) -> Callable[[Path], None]:
    section = full_section(content)
    if content.dtype != "float32":
        raise UserError(f"T5X's checkpoints hold float32, not {content.dtype}")
    if not section["encoder"]:
        raise UserError("T5X's format is of T5 and UL2, from texts to texts")
    entries, activation = t5x.table(section), section["encoder"]["activation"]
    if problems := losses(content, entries, lambda tensors: t5x.describe(tensors, activation)[0]):
        raise UserError(f"T5X has no such model: {', '.join(problems)}")
    return lambda folder: t5x.write(folder, their_arrays(content, entries))


def _stablehlo(content: Content) -> Callable[[Path], None]:
    stablehlo.check(content)
    native = _native(content)

    def write(folder: Path) -> None:
        native(folder)
        stablehlo.write(folder, content, DTYPES[content.dtype])

    return write


def _peft(content: Content) -> Callable[[Path], None]:
    if not content.low_rank:
        raise UserError("PEFT's format is of LowRank alone; this model has no insertion")
    return content.low_rank(content)


# Each checks that the format can express the content, and returns the function that writes a folder or file.
FORMATS = {
    "native": _native,
    "hf": _transformers,
    "open_clip": _open_clip,
    "big_vision": _big_vision,
    "t5x": _t5x,
    "stablehlo": _stablehlo,
    "peft": _peft,
}
