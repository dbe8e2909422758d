"""Bare files: tensors without a config beside them, recognised by their names and shapes."""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path

from vlm_jax.errors import UserError
from vlm_jax.zoo import families, preprocessing
from vlm_jax.zoo.formats import big_vision, efficientnet, open_clip, open_clip_coca
from vlm_jax.zoo.readers.tensors import Tensor, TensorFile
from vlm_jax.zoo.released import Released, Told, of_texts, scanned


def read(file: TensorFile, told: Told) -> Released:
    """Returns the description of a file of tensors.

    Raises:
      UserError: the tensors are of no known family, or do not determine a setting that `told` leaves open.
    """
    names = list(file.tensors)
    if open_clip.recognise(names):
        return _clip(file, told)
    if big_vision.recognise(names):
        return _big_vision(file.path, big_vision.of_today(file.tensors), told)
    if "_conv_stem.weight" in names:
        settings = efficientnet.settings(file.tensors)
        entries = efficientnet.table(sum(name.endswith("._project_conv.weight") for name in names))
        return Released(
            "EfficientNet-Lite", file.path, file.tensors, settings["model"], entries, efficientnet.IGNORED,
            preprocess=settings["preprocess"],
        )  # fmt: skip
    raise UserError(f"{file.path} holds {len(names)} tensors {families.unknown(names)}")


def _clip(file: TensorFile, told: Told) -> Released:
    openai = file.kind == "torchscript"  # only OpenAI released CLIPs as archives
    if open_clip_coca.recognise(file.tensors):
        section, entries, ignored = open_clip_coca.describe(file.tensors)
    else:
        told = dataclasses.replace(told, activation=told.activation or ("quick_gelu" if openai else None))
        section, entries, ignored = open_clip.describe(file.tensors, None, told)
    image, text = section["image"], section["text"]
    fields, hints = {}, {"preprocess": "the file does not tell how its pictures were prepared"}
    if openai:
        fields["preprocess"] = preprocessing.FAMILIES["openai"](image["image_size"])
    if text["vocab_size"] == 49_408:
        fields |= dict(tokenizer="clip", tokenize=f"tokenize({text['length']})")
    return Released(
        "OpenAI's CLIP" if openai else "bare open_clip weights", file.path, file.tensors, scanned(section), entries,
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


def _big_vision(path: Path, tensors: Mapping[str, Tensor], told: Told) -> Released:
    known = next((row for row in KNOWN if re.match(row[0], path.name)), None)
    section, entries = big_vision.describe(tensors, told.with_pool("text", "last") if known else told)
    image, text = section["image"], of_texts(section)
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
    return Released("big_vision", path, tensors, scanned(section), entries, (), **fields, hints=hints)
