"""Tokenizers beside released weights: read from Transformers folders, copied, and written as such.

A spec is the argument of `vlm_jax.data.tokenizers.build`; the ops string turns "text" into "token_ids".
"""

import filecmp
import json
import shutil
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers as hf

from vlm_jax.data import ops, tokenizers
from vlm_jax.data.files import inside, read_json, replacing
from vlm_jax.data.package_files import locate
from vlm_jax.data.tokenizers import clip, guard, library, wordpiece
from vlm_jax.errors import UserError
from vlm_jax.zoo import tokenizer_settings
from vlm_jax.zoo.tokenizer_settings import FIX

# (kind of spec, file), in order of preference.
FILES = (
    ("json", "tokenizer.json"),
    ("sentencepiece", "spiece.model"),
    ("sentencepiece", "tokenizer.model"),
    ("bpe", "vocab.json"),
    ("wordpiece", "vocab.txt"),
)
KEPT = "tokenizer"  # a folder in a workdir
SENTENCEPIECE = ("SiglipTokenizer", "T5Tokenizer")  # their ids are the SentencePiece model's own, with EOS added
SIGLIP2 = ("GemmaTokenizer", "Siglip2Tokenizer")  # under a SigLIP model: lower-cased, EOS only, padded on the right
WRAPPING = {"CLIPTokenizer": ("bos_token", "eos_token"), "BertTokenizer": ("cls_token", "sep_token")}
T5 = ("t5", "mt5")  # model types
CLASSES = dict.fromkeys(T5, "T5Tokenizer")
CLASSES |= {
    "clip": "CLIPTokenizer",
    "siglip": "SiglipTokenizer",
    "siglip2": "Siglip2Tokenizer",
    "bert": "BertTokenizer",
}


# --- reading --------------------------------------------------------------------------------------------------------


def from_transformers(
    folder: str | Path, length: int, model_type: str, *, clean: Sequence[str] = (), strip_sep: bool = False
) -> tuple[str, str]:
    """Returns (tokenizer spec, ops) of a Transformers or sentence-transformers folder.

    Args:
      folder: holds tokenizer.json, spiece.model, tokenizer.model, vocab.json with merges.txt, or vocab.txt, and
        settings: tokenizer_config.json, special_tokens_map.json.
      length: the text tower's.
      model_type: the model's, from config.json: "clip", "siglip", "siglip2", "bert", ...
      clean: text ops before the tokenizer; "canonicalize" leaves the tokenizer's own ops nothing to do.
      strip_sep: whether id 0 replaces the separator at the end (open_clip's `strip_sep_token`).

    Raises:
      UserError: there is no tokenizer, or a setting of the tokenizer is unknown.
    """
    folder = _transformer_folder(Path(folder))
    settings = read_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")
    tokenizer_settings.check(settings, folder / "tokenizer_config.json")
    name = str(settings.get("tokenizer_class") or CLASSES.get(model_type.split("_")[0], "")).removesuffix("Fast")
    siglip2 = name in SIGLIP2 and model_type.startswith("siglip")
    if settings.get("padding_side") == "left" and not siglip2:
        raise UserError(f"{folder}: the tokenizer pads on the left (padding_side), which no tower here reads; {FIX}")
    kind, path = _file(folder, name, siglip2)
    spec = f"{kind}:{path}"
    if kind == "sentencepiece":
        extra = int(settings.get("extra_ids", 100)) if model_type in T5 else 0
        spec += f"?extra_ids={extra}" if extra else ""
        ids, find, added = _sentencepiece(path, settings)
    else:
        spec += "?cased=true" if kind == "wordpiece" and settings.get("do_lower_case") is False else ""
        with guard.refusing(str(path)):
            ids, find, added = _library(kind, path, name, settings)
    pad = find(_content(settings.get("pad_token")))
    wanted = {"pad_id": ids["pad_id"] if pad is None else pad, "bos_id": added[0], "eos_id": added[1]}
    if siglip2:
        wanted |= {"bos_id": None, "eos_id": find(_content(settings.get("eos_token")) or "<eos>")}
    if strip_sep:
        separator = find(_content(settings.get("sep_token")) or ("[SEP]" if name == "BertTokenizer" else None))
        if separator is None or wanted["eos_id"] != separator:
            raise UserError(f"{folder}: strip_sep_token is set, but the tokenizer ends no text with a separator; {FIX}")
        wanted["eos_id"] = 0
    options = "&".join(f"{key}={i}" for key, i in wanted.items() if i is not None and i != ids[key])
    if options:
        spec += ("&" if "?" in spec else "?") + options
    absent = "".join(f", {key}=False" for key in ("bos", "eos") if wanted[f"{key}_id"] is None)
    own = [] if "canonicalize" in clean else _before(folder, name, siglip2, settings)
    return spec, " | ".join([*dict.fromkeys([*clean, *own]), f"tokenize({length}{absent})"])


def _transformer_folder(folder: Path) -> Path:
    """Returns the folder of the transformer: the root, or the first module's (sentence-transformers)."""
    modules = folder / "modules.json"
    if not modules.is_file():
        return folder
    first = next(iter(read_json(modules, list)), {})
    return inside(folder, first.get("path", ""))


def _content(token: Any) -> str | None:
    """A special token's text: the files have it bare, or as a dict."""
    return token.get("content") if isinstance(token, dict) else token


def _file(folder: Path, name: str, siglip2: bool) -> tuple[str, Path]:
    there = [(kind, folder / file) for kind, file in FILES if (folder / file).is_file()]
    if name in SENTENCEPIECE:  # Transformers too reads spiece.model, where a folder has both
        there.sort(key=lambda item: item[0] != "sentencepiece")
    if not there:
        looked_for = ", ".join(file for _, file in FILES)
        raise UserError(f"{folder} has no tokenizer; looked for {looked_for}: {FIX}")
    kind, path = there[0]
    known = {"sentencepiece": SENTENCEPIECE + (SIGLIP2 if siglip2 else ()), "bpe": ("CLIPTokenizer",)}
    if kind in known and name not in known[kind]:
        raise UserError(f"{path} is of class {name or 'unknown'}; expected {', '.join(known[kind])}: {FIX}")
    return kind, path


def _library(kind: str, path: Path, name: str, settings: Mapping[str, Any]) -> tuple:
    """Returns (ids from `build`, token -> id, (BOS, EOS) added by Transformers), by the `tokenizers` library."""
    read = {"json": library.from_file, "bpe": clip.from_files, "wordpiece": wordpiece.from_file}[kind]
    model = read(str(path))
    tokenizer_settings.check_model(path, kind, model, settings)
    find = lambda token: None if token is None else model.token_to_id(token)
    ids, added = library.special_ids(model), library.around(model)
    flags = [settings.get(f"add_{key}_token") for key in ("bos", "eos")]
    if name in WRAPPING:
        added = added or tuple(find(_content(settings.get(key))) for key in WRAPPING[name])
        added = tuple(ids[key] if i is None else i for key, i in zip(("bos_id", "eos_id"), added, strict=True))
    elif flags != [None, None]:
        tokens = [find(_content(settings.get(f"{key}_token"))) for key in ("bos", "eos")]
        added = tuple(token if flag else None for token, flag in zip(tokens, flags, strict=True))
    return ids, find, added or (None, None)


def _sentencepiece(path: Path, settings: Mapping[str, Any]) -> tuple:
    """As `_library`, for a SentencePiece model."""
    tokenizer = tokenizers.build(f"sentencepiece:{path}")
    ids = {key: getattr(tokenizer, key) for key in ("pad_id", "bos_id", "eos_id")}
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    bos = ids["bos_id"] if settings.get("add_bos_token") else None
    return ids, pieces.get, (bos, ids["eos_id"])


def _before(folder: Path, name: str, siglip2: bool, settings: Mapping[str, Any]) -> list[str]:
    """Returns the text ops that the tokenizer's own file lacks."""
    if name == "SiglipTokenizer":
        options = "" if settings.get("do_lower_case", True) else "lower=False, "
        return [f"canonicalize({options}underscore='drop')"]
    sentence_lower = read_json(folder / "sentence_bert_config.json").get("do_lower_case")
    return ["lower"] if siglip2 or sentence_lower else []


# --- copying --------------------------------------------------------------------------------------------------------


def copy(spec: str, folder: str | Path) -> str:
    """Copies the files that `spec` names into `folder`; returns the spec with the bare file name.

    A packaged tokenizer has no files; its spec is returned unchanged.
    """
    tokenizers.build(spec)  # raises if the spec is wrong
    kind, path, query = _parts(spec)
    if path is None:
        return spec
    for file in _files(kind, path):
        target = Path(folder) / file.name
        if not (target.exists() and target.samefile(file)):
            shutil.copyfile(file, target)
    return f"{kind}:{path.name}{query}"


def _files(kind: str, path: Path) -> list[Path]:
    return [path, *([path.with_name("merges.txt")] if kind == "bpe" else [])]


def keep(spec: str, workdir: Path, begun: bool) -> None:
    """Copies the files that a run's spec names into its workdir, so that they may move; see `kept`.

    Raises:
      UserError: the run has begun with other files.
    """
    kind, path, _ = _parts(spec)
    for file in _files(kind, path) if path else ():
        own = workdir / KEPT / file.name
        if not file.is_file() or (own.is_file() and filecmp.cmp(file, own, shallow=False)):
            continue
        if begun and own.is_file():
            raise UserError(f"{file} has changed since the run began, which used {own}; give another --workdir")
        own.parent.mkdir(exist_ok=True)
        with replacing(own) as out:
            out.write(file.read_bytes())


def kept(spec: str, workdir: Path, missing: bool = False) -> str:
    """Returns the spec of a run's own copy of a tokenizer's files; `spec` if it names none, or there is no copy.

    Args:
      spec: of the run's config.
      workdir: of the run.
      missing: returns `spec` also if the files that it names are there.
    """
    kind, path, query = _parts(spec)
    files = _files(kind, path) if path else []
    own = [inside(workdir / KEPT, file.name) for file in files]
    if not files or not all(map(Path.is_file, own)) or (missing and all(map(Path.is_file, files))):
        return spec
    return f"{kind}:{own[0]}{query}"


def _parts(spec: str) -> tuple[str, Path | None, str]:
    head, mark, query = spec.partition("?")
    kind, _, path = head.partition(":")
    return kind, locate(path) if path else None, mark + query


# --- writing --------------------------------------------------------------------------------------------------------


def to_transformers(spec: str, tokenize_ops: str, folder: str | Path) -> None:
    """Writes AutoTokenizer's files into `folder`: tokenizer.json (SigLIP, T5: spiece.model) and settings.

    The ids are the same, with two exceptions. For the packaged `clip`, Transformers pads with <|endoftext|>, and OpenAI
    with 0; no embedding depends on it. For it and for `clean`, Transformers neither unescapes HTML nor makes
    characters plain.

    Args:
      spec: of the tokenizer.
      tokenize_ops: e.g. "lower | tokenize(64, bos=False)".
      folder: an existing folder.

    Raises:
      UserError: Transformers has no equivalent.
    """
    tokenizer = tokenizers.build(spec)
    pipeline = ops.parse(tokenize_ops, tokenizer)
    steps = {step.name: step.kwargs for step in (*pipeline.before, *pipeline.after)}
    if "tokenize" not in steps or not set(steps) <= {"clean", "lower", "canonicalize", "tokenize"}:
        expected = "`tokenize(...)`, before it `clean`, `lower` or `canonicalize`"
        raise UserError(f"tokenize `{tokenize_ops}` has no equivalent in Transformers; expected {expected}")
    kind, path, query = _parts(spec)
    options, canonical = steps["tokenize"], steps.get("canonicalize")
    around = [
        tokenizer.bos_id if options.get("bos", True) else None,
        tokenizer.eos_id if options.get("eos", True) else None,
    ]
    if kind == "sentencepiece" and around[0] is None and around[1] is not None:
        to = (path, Path(folder), tokenizer, options["length"])
        extra = dict(urllib.parse.parse_qsl(query[1:])).get("extra_ids")
        if set(steps) == {"canonicalize", "tokenize"} and canonical.get("underscore") == "drop":
            return _write_sentencepiece(*to, "SiglipTokenizer", {"do_lower_case": canonical.get("lower", True)})
        if extra and set(steps) == {"tokenize"}:
            return _write_sentencepiece(*to, "T5Tokenizer", {"extra_ids": int(extra)})
    model = _model(kind, path, query)
    lower = (
        "lower" in steps or "lower=true" in query.lower() or (canonical is not None and canonical.get("lower", True))
    )
    replace = lambda pattern, by: hf.normalizers.Replace(hf.Regex(pattern), by)
    normalizers = [hf.normalizers.Lowercase()] if lower else []
    if "clean" in steps:
        normalizers = [replace(r"\s+", " "), hf.normalizers.Strip(), *normalizers]
    if canonical is not None:
        normalizers += [replace("_", " ")] if canonical.get("underscore", "space") == "space" else []
        normalizers += [replace(r"[!-/:-@\[-`{-~]", ""), replace(r"\s+", " "), hf.normalizers.Strip()]
    name = "PreTrainedTokenizerFast" if normalizers or None in around else _class(model)
    if normalizers:
        model.normalizer = hf.normalizers.Sequence([*normalizers, *filter(None, [model.normalizer])])
    pad = tokenizer.eos_id if kind == "clip" else tokenizer.pad_id
    bos, eos, pad = (None if i is None else model.id_to_token(i) for i in (*around, pad))
    tokens, settings = {"bos_token": bos, "eos_token": eos, "pad_token": pad}, {}
    if name == "BertTokenizer":
        rule = model.normalizer
        tokens = {"cls_token": bos, "sep_token": eos, "pad_token": pad, "unk_token": "[UNK]", "mask_token": "[MASK]"}
        settings = dict(do_lower_case=rule.lowercase, strip_accents=rule.strip_accents)
        settings["tokenize_chinese_chars"] = rule.handle_chinese_chars
    if name != "CLIPTokenizer":
        ids = [(token, i) for token, i in zip((bos, eos), around, strict=True) if i is not None]
        single = [token for token in (bos, "$A", eos) if token is not None]
        model.post_processor = hf.processors.TemplateProcessing(single=single, special_tokens=ids)
    model.save(str(Path(folder) / "tokenizer.json"))
    _write_settings(Path(folder), name, options["length"], tokens, settings)


def _model(kind: str, path: Path | None, query: str) -> hf.Tokenizer:
    """Returns a spec's tokenizer in the `tokenizers` library, without padding and truncation."""
    if kind == "clip":
        vocab, merges = clip.vocabulary()
        start, end = len(vocab), len(vocab) + 1
        specials = dict(zip(clip.SPECIALS, (start, end), strict=True))
        model = clip.from_pairs(vocab | specials, merges, start, end)
    elif kind == "wordpiece":
        model = wordpiece.from_file(str(path), cased="cased=true" in query.lower())
    elif kind == "bpe":
        model = clip.from_files(str(path))
    elif kind == "sentencepiece":
        model = _unigram(path)
    else:
        model = library.from_file(path or library.EMOJI)
    model.no_padding()
    model.no_truncation()
    return model


def _class(model: hf.Tokenizer) -> str:
    """Returns the Transformers class that rebuilds `model` from its vocabulary, else the generic class."""
    with_ends = isinstance(model.model, hf.models.BPE) and model.model.end_of_word_suffix == "</w>"
    if with_ends and None not in map(model.token_to_id, clip.SPECIALS):
        return "CLIPTokenizer"
    if isinstance(model.model, hf.models.WordPiece) and isinstance(model.normalizer, hf.normalizers.BertNormalizer):
        return "BertTokenizer"
    return "PreTrainedTokenizerFast"


def _unigram(path: Path) -> hf.Tokenizer:
    """A SentencePiece model in the `tokenizers` library."""
    from sentencepiece import sentencepiece_model_pb2  # the only import here that needs protobuf

    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != trainer.UNIGRAM:
        raise UserError(f"{path} holds byte pairs, which are not converted; pass its tokenizer.json as `json:...`")
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    model = hf.Tokenizer(hf.models.Unigram(pieces, trainer.unk_id, trainer.byte_fallback))
    steps = [hf.normalizers.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else []
    if rules.remove_extra_whitespaces:
        steps += [hf.normalizers.Strip(), hf.normalizers.Replace(hf.Regex(" {2,}"), " ")]
    model.normalizer = hf.normalizers.Sequence(steps)
    scheme = "always" if rules.add_dummy_prefix else "never"
    model.pre_tokenizer = hf.pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme)
    model.decoder = hf.decoders.Metaspace(replacement="▁", prepend_scheme=scheme)
    model.add_special_tokens([piece.piece for piece in proto.pieces if piece.type in (piece.CONTROL, piece.UNKNOWN)])
    model.add_tokens([piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED])
    return model


def _write_sentencepiece(
    path: Path, folder: Path, tokenizer: tokenizers.Tokenizer, length: int, name: str, settings: dict
) -> None:
    shutil.copyfile(path, folder / "spiece.model")
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = {"eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id, "unk_token": model.unk_id()}
    tokens = {key: model.id_to_piece(i) for key, i in ids.items()}
    _write_settings(folder, name, length, tokens, settings)


def _write_settings(folder: Path, name: str, length: int, tokens: dict[str, str | None], settings: dict) -> None:
    tokens = {key: token for key, token in tokens.items() if token is not None}
    settings = {"tokenizer_class": name, "model_max_length": length, "padding_side": "right"} | tokens | settings
    for file, content in (("tokenizer_config.json", settings), ("special_tokens_map.json", tokens)):
        (folder / file).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
