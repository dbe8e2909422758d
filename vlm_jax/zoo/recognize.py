"""Recognises a checkpoint by content: the format, the model, and the table of the tensors."""

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vlm_jax import models
from vlm_jax.data.files import inside, read_json
from vlm_jax.errors import UserError
from vlm_jax.params.table import named_leaves
from vlm_jax.zoo import bare_files, hub, key_map, open_clip_tokenizers, preprocessing, tokenizer_files
from vlm_jax.zoo.formats import open_clip, open_clip_coca, open_clip_names, t5x, timm, transformers
from vlm_jax.zoo.readers import state_dicts
from vlm_jax.zoo.readers.tensors import Tensor, TensorFile, open_tensors, open_weights
from vlm_jax.zoo.released import Released, Told, of_texts, scanned
from vlm_jax.zoo.shapes import check_sizes, param_shapes

PARAMS = "params.safetensors"
TRANSFORMERS = (  # in the order of preference of Transformers
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
OPEN_CLIP = (
    "open_clip_model.safetensors",
    "open_clip_model.safetensors.index.json",
    "open_clip_pytorch_model.bin",
)


def of_spec(spec: str | os.PathLike, **told: Any) -> Released:
    """Returns the description of what a spec of `vlm_jax.load` names; arguments as for `understand`."""
    return understand(hub.local(spec), named=hub.name_of(spec), **told)


def understand(
    path: str | Path,
    activation: Any = None,
    *,
    pool: Any = None,
    heads: Any = None,
    weights: str | None = None,
    named: tuple[str, str] | None = None,
) -> Released:
    """Recognises a folder or a file by its content; reads headers and no tensor.

    Args:
      path: a folder of ours, of Transformers, of open_clip or of T5X; a file of tensors.
      activation: for bare CLIP weights and T5X, see `open_clip.describe` and `t5x.describe`.
      pool, heads, weights: as for `vlm_jax.load`.
      named: ("open_clip", "ViT-B-32"): what the weights are, whatever lies beside them.

    Raises:
      UserError: the format is unknown, or the parts do not fit.
    """
    path = Path(path)
    if not path.exists():
        hub = re.fullmatch(r"(?:https?:/+)?(?:huggingface\.co/)?([\w.-]+/[\w.-]+)(?:/tree/main)?/?", str(path))
        hint = f"for the Hugging Face hub, write hf:{hub[1]}" if hub else "check the path"
        raise UserError(f"there is no file or folder {path}; {hint}")
    with _understanding(path):
        told = Told(activation, pool, heads, weights)
        return _named(path, *named, told) if named else (_folder if path.is_dir() else _file)(path, told)


@contextlib.contextmanager
def _understanding(path: Path) -> Iterator[None]:
    """Turns the errors of settings that are no settings of a model into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be understood ({error})"
        raise UserError(f"{path} {what}; it is incomplete or damaged: download it again") from error


def _folder(path: Path, told: Told) -> Released:
    if (path / "checkpoints").is_dir():
        return _workdir(path, told)
    settings = read_json(path / "config.json")
    for name in TRANSFORMERS if {"model_type", "architecture"} & settings.keys() else ():
        if (path / name).exists():
            file = open_weights(path / name, told.weights)
            if "model_type" in settings:
                return _transformers(path, settings, file)
            return _timm(file, str(settings["architecture"]), settings)
    if (path / "open_clip_config.json").exists():
        return _open_clip(path, read_json(path / "open_clip_config.json"), told)
    if (path / PARAMS).exists():
        state_dicts.check(told.weights, path)
        return _native(path, settings)
    if t5x.recognise(path):
        state_dicts.check(told.weights, path)
        return _t5x(path, told)
    if "model_type" in settings:
        raise UserError(f"{path} has a config.json but none of its weights: {', '.join(TRANSFORMERS)}")
    raise UserError(
        f"{path} is no checkpoint: expected a folder of Transformers (config.json, model.safetensors), of open_clip "
        f"(open_clip_config.json), of ours (config.json, {PARAMS}), a workdir of vlm_jax.train, or a file"
    )


def _licence(folder: Path) -> str | None:
    """The `license:` of the model card's front matter."""
    card = folder / "README.md"
    if card.is_file():
        front = card.read_text(encoding="utf-8", errors="replace").split("---")
        found = re.search(r'^license:\s*(?:"(.*)"|(\S+))', front[1] if len(front) > 1 else "", re.MULTILINE)
        return found and (found[1] or found[2])
    return None


def _or_none(read: Callable, *args) -> Any:
    """Returns (result of `read`, None), or (None, the UserError's text) if the files do not tell."""
    try:
        return read(*args), None
    except UserError as error:
        return None, str(error)


# --- folders --------------------------------------------------------------------------------------------------------


def _transformers(folder: Path, settings: dict, file: TensorFile) -> Released:
    shapes = {name: tuple(tensor.shape) for name, tensor in file.tensors.items()}
    pooling = transformers.sentence_pooling(folder)
    section, entries, ignored = transformers.describe(settings, shapes, pooling)
    fields, hints = {}, {}
    if section.get("image"):
        fields["preprocess"], hints["preprocess"] = _or_none(preprocessing.from_transformers, folder)
    if text := of_texts(section):
        longest = read_json(folder / "sentence_bert_config.json").get("max_seq_length") or text["length"]
        length, kind = min(longest, text["length"]), settings["model_type"]
        found, hints["tokenizer"] = _or_none(tokenizer_files.from_transformers, folder, length, kind)
        fields["tokenizer"], fields["tokenize"] = found or (None, None)
    return Released(
        f"Transformers {(settings.get('architectures') or [settings['model_type']])[0]}",
        file.path, file.tensors, scanned(section), entries, ignored, **fields, hints=hints, licence=_licence(folder),
    )  # fmt: skip


def _open_clip(folder: Path, settings: dict, told: Told) -> Released:
    name = next((name for name in OPEN_CLIP if (folder / name).exists()), None)
    if name is None:
        raise UserError(f"{folder} has an open_clip_config.json but none of its weights: {', '.join(OPEN_CLIP)}")
    file, cfg = open_weights(folder / name, told.weights), settings.get("model_cfg") or {}
    return _of_open_clip(folder, file, cfg, told, settings.get("preprocess_cfg") or {})


def _of_open_clip(folder: Path, file: TensorFile, cfg: dict, told: Told, preprocess_cfg: dict | None) -> Released:
    family = open_clip_coca if open_clip_coca.recognise(file.tensors) else open_clip
    section, entries, ignored = family.describe(file.tensors, cfg, told)
    text, texts = section["text"], cfg.get("text_cfg") or {}
    fields, hints = {}, {"preprocess": "a name of open_clip does not tell how pictures were prepared"}
    if preprocess_cfg is not None:
        fields["preprocess"], hints["preprocess"] = _or_none(
            preprocessing.from_open_clip, preprocess_cfg, section["image"]["image_size"]
        )
    found, hints["tokenizer"] = _or_none(open_clip_tokenizers.read, folder, text["length"], texts)
    fields["tokenizer"], fields["tokenize"] = found or (None, None)
    return Released(
        "open_clip", file.path, file.tensors, scanned(section), entries, ignored, **fields, hints=hints,
        licence=_licence(folder),
    )  # fmt: skip


def _named(path: Path, project: str, name: str, told: Told) -> Released:
    """A file of weights, or a folder with one, whose model has a name in a project."""
    known = open_clip_names.config(name) if project == "open_clip" else {}
    files = [path / file for file in (*OPEN_CLIP, *TRANSFORMERS)] if path.is_dir() else [path]
    weights = next((file for file in files if file.exists()), None)
    if weights is None:
        raise UserError(f"{path} has no weights; looked for {', '.join(file.name for file in files)}; or name the file")
    if project == "timm":
        return _timm(open_weights(weights, told.weights), name)
    released = _of_open_clip(weights.parent, open_weights(weights, told.weights), known, told, None)
    open_clip_names.check(name, released.model)
    return released


def _timm(file: TensorFile, name: str, settings: dict | None = None) -> Released:
    section, entries = timm.describe({key: tuple(t.shape) for key, t in file.tensors.items()}, name, settings)
    preprocess, hint = None, "a name of timm does not tell how pictures were prepared"
    if settings:
        preprocess, hint = _or_none(preprocessing.from_timm, settings.get("pretrained_cfg") or {})
    return Released(
        f"timm {name}", file.path, file.tensors, scanned(section), entries, preprocess=preprocess,
        hints={"preprocess": hint}, licence=_licence(file.path.parent),
    )  # fmt: skip


def _t5x(folder: Path, told: Told) -> Released:
    tensors = t5x.open_arrays(folder)
    section, entries = t5x.describe(tensors, told.activation)
    return Released("T5X", folder, tensors, scanned(section), entries, tokenize=t5x.TOKENIZE, hints=t5x.HINTS)


def _texts_of(settings: Mapping[str, Any], folder: Path) -> dict[str, str | None]:
    """Returns preprocess, tokenizer and tokenize of our own config.json; raises if one is no text."""
    for key in ("preprocess", "tokenizer", "tokenize"):
        if not isinstance(settings.get(key), str | None):
            raise UserError(f"{folder / 'config.json'} has {key} {settings[key]!r:.200}; expected a string")
    return {key: settings.get(key) for key in ("preprocess", "tokenizer", "tokenize")}


def _native(folder: Path, settings: dict) -> Released:
    if "model" not in settings:
        raise UserError(f"{folder / 'config.json'} has no `model`; expected what vlm_jax.save_pretrained wrote")
    known = _texts_of(settings, folder)
    file = open_tensors(folder / PARAMS)
    for side in ("image", "text"):
        depth = (settings["model"].get(side) or {}).get("depth")
        stacked = [t.shape[0] for name, t in file.tensors.items() if f"{side}/blocks/" in name and t.shape]
        if isinstance(depth, int) and depth > max(stacked, default=len(file.tensors)):
            raise UserError(f"{folder / 'config.json'} has {depth} blocks of the {side} tower; the file holds fewer")
    tokenizer = known["tokenizer"]
    if tokenizer and ":" in tokenizer:  # a file in the same folder
        kind, _, rest = tokenizer.partition(":")
        name, mark, query = rest.partition("?")
        tokenizer = f"{kind}:{inside(folder, name)}{mark}{query}"
        if kind == "bpe":
            inside(folder, str(Path(name).with_name("merges.txt")))
    return Released(
        "vlm_jax",
        file.path,
        file.tensors,
        settings["model"],
        native_entries(param_shapes(settings["model"])),
        **(known | {"tokenizer": tokenizer}),
        licence=settings.get("licence"),
    )


def run_of(path: Path, weights: str | None = None) -> Released:
    """Returns the description of a workdir of `vlm_jax.train`, without tensors.

    weights: "ema" raises if the run keeps no averages; runs that keep them are read by their averages in any case.
    """
    settings = read_json(path / "config.json")
    if not isinstance(settings.get("model"), dict):
        raise UserError(f"{path} holds checkpoints but no config.json of vlm_jax.train")
    if settings.get("stages"):
        from vlm_jax.run import checkpoint, stages  # orbax takes a while to import

        settings = stages.changed(settings, checkpoint.newest_progress(path)["stage"])
    state_dicts.check(weights, None if settings.get("ema") else path)
    known = _texts_of(settings, path)
    if known["tokenizer"]:
        known["tokenizer"] = tokenizer_files.kept(known["tokenizer"], path)
    check_sizes(settings["model"])
    with _understanding(path):
        models.build(settings["model"])
    return Released("a workdir of vlm_jax.train", path, {}, settings["model"], (), **known, run=settings)


def _file(path: Path, told: Told) -> Released:
    for parent_config in ("config.json", "open_clip_config.json"):
        if path.name in (*TRANSFORMERS, *OPEN_CLIP, PARAMS) and (path.parent / parent_config).is_file():
            return _folder(path.parent, told)
    return bare_files.read(open_weights(path, told.weights), told)


def _workdir(path: Path, told: Told) -> Released:
    from vlm_jax.run import checkpoint  # orbax takes a while to import

    params = named_leaves(checkpoint.load_params(path))
    tensors = {
        name: Tensor(leaf.shape, leaf.dtype, lambda index, leaf=leaf: leaf[index].copy())
        for name, leaf in params.items()
    }
    return dataclasses.replace(run_of(path, told.weights), tensors=tensors, entries=native_entries(params))


def native_entries(shapes: Mapping[str, Any]) -> list[key_map.Entry]:
    """Returns the entries of our own format: equal names, every parameter unchanged."""
    entries = []
    for name, leaf in shapes.items():
        if key_map.is_scanned(name):
            for i in range(leaf.shape[0]):
                ours = name.replace("blocks/", f"blocks_{i}/")
                entries.append(key_map.Entry(ours, name, key_map.Layout(), block=(0, i, leaf.shape[0])))
        else:
            entries.append(key_map.Entry(name, name, key_map.Layout()))
    return entries
