"""Recognises a checkpoint by content: the format, the model, and the table of the tensors."""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from vlm_jax import models
from vlm_jax.data.files import inside, read_json
from vlm_jax.errors import UserError
from vlm_jax.params.table import named_leaves
from vlm_jax.zoo import key_map, preprocessing, tokenizer_files
from vlm_jax.zoo.formats import big_vision, efficientnet, open_clip, open_clip_coca, t5x, transformers
from vlm_jax.zoo.readers.tensors import Tensor, TensorFile, open_tensors
from vlm_jax.zoo.shapes import check_sizes, param_shapes

PARAMS = "params.safetensors"
SIDES = ("image", "text", "encoder", "decoder")  # parts of a model section
TRANSFORMERS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
OPEN_CLIP = (
    "open_clip_model.safetensors.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)


@dataclasses.dataclass(frozen=True)
class Released:
    """A recognised checkpoint, whose tensors are not read yet.

    Attributes:
      format: name of the format.
      path: the file of the tensors.
      tensors: name -> `tensors.Tensor`.
      model: config section of our model, for `models.build`.
      entries: the key table.
      ignored: patterns of tensors that no parameter uses.
      preprocess, tokenizer, tokenize: as in a training config; None where the files do not tell.
      hints: for each of these that is None, advice on the argument of `load`.
      licence: from the model card, or None.
      run: the config of a workdir of `vlm_jax.train`, or None.
    """

    format: str
    path: Path
    tensors: Mapping[str, Tensor]
    model: dict[str, Any]
    entries: Sequence[key_map.Entry]
    ignored: Sequence[str] = ()
    preprocess: str | None = None
    tokenizer: str | None = None
    tokenize: str | None = None
    hints: Mapping[str, str] = dataclasses.field(default_factory=dict)
    licence: str | None = None
    run: dict[str, Any] | None = None

    @functools.cached_property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Parameter name -> shape of the model."""
        check_sizes(self.model)
        table = next(
            (self.tensors.get(entry.theirs) for entry in self.entries if entry.ours == "image/pos_embed"), None
        )
        rows = math.prod(table.shape[:-1]) if table is not None else None
        return param_shapes(self.model, rows)

    def with_image_size(self, size: tuple[int, int]) -> "Released":
        """Returns a copy for pictures of (height, width), if the checkpoint has no size of its own.

        Raises:
          UserError: the checkpoint has a size, no image tower, or positions for another number of patches.
        """
        image = self.model.get("image")
        own = image and image.get("image_size")
        if own or not image:
            raise UserError(f"{self.path} has {f'the image_size {own}' if image else 'no image tower'}")
        rows = self.shapes.get("image/pos_embed")
        patches = (size[0] // image["patch"]) * (size[1] // image["patch"])
        if rows is not None and rows.shape[1] - image.get("cls_position", False) != patches:
            raise UserError(f"{self.path} has {rows.shape[1]} positions; image_size {size} gives {patches} patches")
        return dataclasses.replace(self, model={**self.model, "image": {**image, "image_size": size}})

    def match(self) -> dict[str, list[key_map.Entry]]:
        """Returns parameter name -> entries; raises a UserError if parameters or tensors are left over."""
        try:
            shapes = self.shapes
        except (LookupError, TypeError, ValueError, ArithmeticError) as error:
            raise UserError(f"{self.path} ({self.format}): no model can have its settings: {error}") from error
        return key_map.match(self.entries, shapes, self.tensors, self.ignored, f"{self.path} ({self.format})")


def understand(path: str | Path, activation: str | None = None) -> Released:
    """Recognises a folder or a file by its content; reads headers and no tensor.

    Args:
      path: a folder of ours, of Transformers, of open_clip or of T5X; a file of tensors.
      activation: for bare CLIP weights and T5X, see `open_clip.describe` and `t5x.describe`.

    Raises:
      UserError: the format is unknown, or the parts do not fit.
    """
    path = Path(path)
    if not path.exists():
        hub = re.fullmatch(r"(?:https?:/+)?(?:huggingface\.co/)?([\w.-]+/[\w.-]+)(?:/tree/main)?/?", str(path))
        hint = f"for the Hugging Face hub, write hf:{hub[1]}" if hub else "check the path"
        raise UserError(f"there is no file or folder {path}; {hint}")
    with _understanding(path):
        return (_folder if path.is_dir() else _file)(path, activation)


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


def _folder(path: Path, activation: str | None) -> Released:
    if (path / "checkpoints").is_dir():
        return _workdir(path)
    settings = read_json(path / "config.json")
    for name in TRANSFORMERS if "model_type" in settings else ():
        if (path / name).exists():
            return _transformers(path, settings, open_tensors(path / name))
    if (path / "open_clip_config.json").exists():
        return _open_clip(path, read_json(path / "open_clip_config.json"))
    if (path / PARAMS).exists():
        return _native(path, settings)
    if t5x.recognise(path):
        return _t5x(path, activation)
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
        found = re.search(r"^license:\s*(\S+)", front[1] if len(front) > 1 else "", re.MULTILINE)
        return found[1] if found else None
    return None


def _scanned(section: dict) -> dict:
    """Sets the blocks to one scan, which compiles in a fraction of the time."""
    for side in SIDES:
        if section.get(side) and section[side].get("depth", 1) > 1:
            section[side]["scan"] = True
    return section


def of_texts(section: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Returns the section of the text tower or the decoder, or None."""
    return section.get("text") or section.get("decoder")


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
        file.path, file.tensors, _scanned(section), entries, ignored, **fields, hints=hints, licence=_licence(folder),
    )  # fmt: skip


def _open_clip(folder: Path, settings: dict) -> Released:
    name = next((name for name in OPEN_CLIP if (folder / name).exists()), None)
    if name is None:
        raise UserError(f"{folder} has an open_clip_config.json but none of its weights: {', '.join(OPEN_CLIP)}")
    file, cfg = open_tensors(folder / name), settings.get("model_cfg") or {}
    family = open_clip_coca if open_clip_coca.recognise(file.tensors) else open_clip
    section, entries, ignored = family.describe(file.tensors, cfg)
    text, texts = section["text"], cfg.get("text_cfg") or {}
    fields, hints = {}, {}
    fields["preprocess"], hints["preprocess"] = _or_none(
        preprocessing.from_open_clip, settings.get("preprocess_cfg") or {}, section["image"]["image_size"]
    )
    if texts.get("hf_tokenizer_name"):
        found, hints["tokenizer"] = _or_none(tokenizer_files.from_transformers, folder, text["length"], "siglip")
        fields["tokenizer"], fields["tokenize"] = found or (None, None)
    else:
        fields |= dict(tokenizer="clip", tokenize=f"tokenize({text['length']})")
    return Released(
        "open_clip", file.path, file.tensors, _scanned(section), entries, ignored, **fields, hints=hints,
        licence=_licence(folder),
    )  # fmt: skip


def _t5x(folder: Path, activation: str | None) -> Released:
    tensors = t5x.open_arrays(folder)
    section, entries = t5x.describe(tensors, activation)
    return Released("T5X", folder, tensors, _scanned(section), entries, tokenize=t5x.TOKENIZE, hints=t5x.HINTS)


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


def run_of(path: Path) -> Released:
    """Returns the description of a workdir of `vlm_jax.train`, without tensors."""
    settings = read_json(path / "config.json")
    if not isinstance(settings.get("model"), dict):
        raise UserError(f"{path} holds checkpoints but no config.json of vlm_jax.train")
    if settings.get("stages"):
        from vlm_jax.run import checkpoint, stages  # orbax takes a while to import

        settings = stages.changed(settings, checkpoint.newest_progress(path)["stage"])
    known = _texts_of(settings, path)
    if known["tokenizer"]:
        known["tokenizer"] = tokenizer_files.kept(known["tokenizer"], path)
    check_sizes(settings["model"])
    with _understanding(path):
        models.build(settings["model"])
    return Released("a workdir of vlm_jax.train", path, {}, settings["model"], (), **known, run=settings)


def _workdir(path: Path) -> Released:
    from vlm_jax.run import checkpoint  # orbax takes a while to import

    params = named_leaves(checkpoint.load_params(path))
    tensors = {
        name: Tensor(leaf.shape, leaf.dtype, lambda index, leaf=leaf: leaf[index].copy())
        for name, leaf in params.items()
    }
    return dataclasses.replace(run_of(path), tensors=tensors, entries=native_entries(params))


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


# --- bare files -----------------------------------------------------------------------------------------------------


def _file(path: Path, activation: str | None) -> Released:
    for parent_config in ("config.json", "open_clip_config.json"):
        if path.name in (*TRANSFORMERS, *OPEN_CLIP, PARAMS) and (path.parent / parent_config).is_file():
            return understand(path.parent)
    file = open_tensors(path)
    names = list(file.tensors)
    if open_clip.recognise(names):
        return _bare_clip(file, activation)
    if big_vision.recognise(names):
        return _big_vision(path, big_vision.of_today(file.tensors))
    if "_conv_stem.weight" in names:
        settings = efficientnet.settings(file.tensors)
        entries = efficientnet.table(sum(name.endswith("._project_conv.weight") for name in names))
        return Released(
            "EfficientNet-Lite", path, file.tensors, settings["model"], entries, efficientnet.IGNORED,
            preprocess=settings["preprocess"],
        )  # fmt: skip
    shown = ", ".join(names[:4])
    raise UserError(f"{path} holds {len(names)} tensors ({shown}, ...), which are of no format that is known")


def _bare_clip(file: TensorFile, activation: str | None) -> Released:
    openai = file.kind == "torchscript"  # only OpenAI released CLIPs as archives
    if open_clip_coca.recognise(file.tensors):
        section, entries, ignored = open_clip_coca.describe(file.tensors)
    else:
        activation = activation or ("quick_gelu" if openai else None)
        section, entries, ignored = open_clip.describe(file.tensors, None, activation)
    image, text = section["image"], section["text"]
    fields, hints = {}, {"preprocess": "the file does not tell how its pictures were prepared"}
    if openai:
        fields["preprocess"] = preprocessing.FAMILIES["openai"](image["image_size"])
    if text["vocab_size"] == 49_408:
        fields |= dict(tokenizer="clip", tokenize=f"tokenize({text['length']})")
    return Released(
        "OpenAI's CLIP" if openai else "bare open_clip weights", file.path, file.tensors, _scanned(section), entries,
        ignored, **fields, hints=hints,
    )  # fmt: skip


# Released files by name, for settings that arrays cannot tell.
SIGLIP_TEXT = "lower | tokenize({length}, bos=False)"
KNOWN = (  # (name, how texts are made tokens, the tokenizer to pass)
    (r"(webli|siglip)_(en|i18n)_\w+", SIGLIP_TEXT, "sentencepiece:/path/to/{vocabulary}.model?pad_id=1"),
    (r"siglip2_\w+", SIGLIP_TEXT, "sentencepiece:/path/to/gemma.model?pad_id=0"),
    (r"LiT-(B16B|B16B_2|L16L)", "tokenize(16)", "wordpiece:/path/to/vocab.txt"),
    (r"cap(pa)?_\w+", SIGLIP_TEXT, "sentencepiece:/path/to/{vocabulary}.model?pad_id=0"),
)


def _big_vision(path: Path, tensors: Mapping[str, Tensor]) -> Released:
    section, entries = big_vision.describe(tensors)
    image, text = section["image"], of_texts(section)
    known = next((row for row in KNOWN if re.match(row[0], path.name)), None)
    fields, hints = {}, {}
    if image:
        hints["preprocess"] = "an npz does not tell how its pictures were prepared"
        size = re.search(r"_(\d{3})(?:[_.]|$)", path.name)
        table = tensors.get("img/pos_embedding", tensors.get("pos_embedding"))
        side = math.isqrt(table.shape[1]) if table is not None and len(table.shape) == 3 else 0
        if known and (size or side):
            ops = preprocessing.FAMILIES["big_vision"](int(size[1]) if size else side * image["patch"])
            fields["preprocess"] = ops
    if text:
        hints["tokenizer"] = "an npz does not hold its tokenizer"
        if known:
            fields["tokenize"] = known[1].format(length=text["length"])
            vocabulary = "c4_en" if text["vocab_size"] == 32_000 else "mc4"
            hints["tokenizer"] += f": pass tokenizer='{known[2].format(vocabulary=vocabulary)}'"
    return Released("big_vision", path, tensors, _scanned(section), entries, (), **fields, hints=hints)
