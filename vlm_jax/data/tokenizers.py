"""Text to token ids: CLIP's byte pairs, SentencePiece, WordPiece, any `tokenizer.json`, one trained on the emoji names.

A tokenizer is named by a spec, a string that can stand in a config:

    clip                            49,408 ids, lower-cased, pad 0 (Radford et al. 2021, arXiv:2103.00020)
    emoji                           trained on the English names and keywords of the embedded training split
    sentencepiece:/path/spm.model   SigLIP, Gemma, Llama; T5 with `?extra_ids=100`
    wordpiece:/path/vocab.txt       BERT, lower-cased but with `?cased=true`
    bpe:/path/vocab.json            CLIP's byte pairs as Transformers reads them, with merges.txt beside
    json:/path/tokenizer.json       any file of the `tokenizers` library, `train_tokenizer`'s own among them

Options follow a `?`, as in `sentencepiece:/path/spm.model?pad_id=1&lower=true` (SigLIP's use of T5's vocabulary).
What a tokenizer.json's post-processor puts around a text is BOS and EOS; else they are known by their usual names.
"""

import dataclasses
import functools
import gzip
import html
import itertools
import pathlib
import re
import unicodedata
import urllib.parse
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import sentencepiece
import tokenizers as hf

from vlm_jax import config
from vlm_jax.data.package_files import locate
from vlm_jax.errors import UserError

VOCAB = pathlib.Path(__file__).parent / "vocab"
REMEMBERED_TEXTS = 2**14  # per tokenizer: class names and captions of small sets come again every epoch


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Maps texts to ids. Special ids are None where the vocabulary has none. Pickles as its spec."""

    spec: str
    vocab_size: int
    pad_id: int | None
    bos_id: int | None
    eos_id: int | None
    encode_text: Callable[[str], tuple[int, ...]] = dataclasses.field(repr=False, compare=False)
    decode_ids: Callable[[list[int]], str] = dataclasses.field(repr=False, compare=False)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of one text, without specials."""
        return list(self.encode_text(text))

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids: without padding and BOS, up to the first EOS."""
        ids, special = [int(i) for i in ids], (self.pad_id, self.bos_id)
        if self.eos_id in ids and self.eos_id not in special:
            ids = ids[: ids.index(self.eos_id)]
        return self.decode_ids([i for i in ids if i not in special and i < self.vocab_size]).strip()

    def __call__(self, texts: str | Sequence[str], length: int, bos: bool = True, eos: bool = True) -> np.ndarray:
        """Returns `[BOS] text [EOS] pad pad ...`, int32 [B, length]; a long text is cut, EOS kept.

        `bos` and `eos` are ignored where the vocabulary has no such id.
        """
        if self.pad_id is None:
            raise UserError(f"tokenizer `{self.spec}` has no padding id; name one, as in `{self.spec}?pad_id=0`")
        texts = [texts] if isinstance(texts, str) else texts
        start = [self.bos_id] if bos and self.bos_id is not None else []
        end = [self.eos_id] if eos and self.eos_id is not None else []
        room = length - len(start) - len(end)
        if room < 1:
            raise UserError(f"a text of length {length} has no room for a token beside BOS and EOS; expected >= 3")
        ids = np.full((len(texts), length), self.pad_id, np.int32)
        for row, text in zip(ids, texts, strict=True):
            tokens = [*start, *self.encode_text(text)[:room], *end]
            row[: len(tokens)] = tokens
        return ids

    def __reduce__(self):
        return build, (self.spec,)


def build(spec: str) -> Tokenizer:
    """Returns the tokenizer that `spec` names (see the module's docstring).

    Raises:
      UserError: the spec is unknown, or its file is missing or not what the spec says.
    """
    head, _, query = spec.partition("?")
    kind, _, path = head.partition(":")
    options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    builder = config.choose(BUILDERS, kind, "the tokenizer spec")
    if kind not in PACKAGED:
        if not path:
            raise UserError(f"tokenizer spec `{spec}` names no file; expected `{kind}:/path/to/file`")
        options["path"] = str(locate(path))
        if not pathlib.Path(options["path"]).is_file():
            raise UserError(f"tokenizer spec `{spec}`: there is no file {options['path']}")
    elif path:
        raise UserError(f"tokenizer spec `{spec}`: `{kind}` is packaged and takes no path; write `{kind}`")
    lower = _truth(options.pop("lower", "false"), spec, "lower")
    ids = {key: _integer(options.pop(key), key, spec) for key in ("pad_id", "bos_id", "eos_id") if key in options}
    fields = config.call(builder, options, f"tokenizer spec `{spec}`") | ids
    encode, decode = fields.pop("encode"), fields.pop("decode")
    return Tokenizer(
        spec=spec,
        decode_ids=decode,
        encode_text=functools.lru_cache(REMEMBERED_TEXTS)(lambda text: tuple(encode(text.lower() if lower else text))),
        **fields,
    )


def _truth(value: str, spec: str, key: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise UserError(f"tokenizer spec `{spec}`: {key} is `{value}`; expected true or false")
    return value.lower() == "true"


def _integer(value: str, key: str, spec: str) -> int:
    if not value.isdecimal():
        raise UserError(f"tokenizer spec `{spec}`: {key} is `{value}`; expected a token id, a whole number")
    return int(value)


# --- CLIP -----------------------------------------------------------------------------------------------------------

# What CLIP's use of ftfy does to text that is not mis-decoded: straight quotes, plain letters for ligatures and
# full-width forms, no control characters, NFC. (Repair of mis-decoded text, "CafÃ©", is not done.)
_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]")
_WIDE = (0x3000, *range(0xFF01, 0xFFF0))
_LIGATURES = (0x0132, 0x0133, *range(0x01C4, 0x01CD), *range(0x01F1, 0x01F4), *range(0xFB00, 0xFB07))
_PLAIN = {c: unicodedata.normalize("NFKC", chr(c)) for c in (*_WIDE, *_LIGATURES)}
_PLAIN |= {0x0149: "'n"} | dict.fromkeys((0x02BC, *range(0x2018, 0x201C)), "'")
_PLAIN |= dict.fromkeys(range(0x201C, 0x2020), '"')


def clip_clean(text: str) -> str:
    """Returns `text` as CLIP's byte pairs expect it: unescaped, plain characters, single spaces, lower case."""
    text = _CONTROL.sub("", html.unescape(html.unescape(text)))
    if not text.isascii():
        text = unicodedata.normalize("NFC", text.translate(_PLAIN))
    return " ".join(text.split()).lower()


def _byte_alphabet() -> list[str]:
    """Returns the 256 printable stand-ins for bytes, in CLIP's order: bytes that print first, then the rest."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
CLIP_SPECIALS = ("<|startoftext|>", "<|endoftext|>")


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """OpenAI's pieces, without the two specials after them, and merges."""
    lines = gzip.decompress((VOCAB / "clip" / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49_152 - 256 - 2 + 1]]  # 49,152 = vocabulary before </w> bytes
    alphabet = _byte_alphabet()
    pieces = [*alphabet, *(c + "</w>" for c in alphabet), *map("".join, merges)]
    return {piece: i for i, piece in enumerate(pieces)}, merges


@functools.cache
def _clip_model() -> hf.Tokenizer:
    model = hf.Tokenizer(hf.models.BPE(*clip_vocabulary(), end_of_word_suffix="</w>"))
    words = hf.Regex(CLIP_WORDS)
    model.pre_tokenizer = hf.pre_tokenizers.Sequence(
        [
            hf.pre_tokenizers.Split(words, behavior="removed", invert=True),
            hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = hf.decoders.ByteLevel()
    return model


def _clip() -> dict:
    model = _clip_model()
    return {
        "encode": lambda text: model.encode(clip_clean(text)).ids,
        "decode": lambda ids: model.decode(ids).replace("</w>", " "),
        "vocab_size": 49_408,
        "pad_id": 0,
        "bos_id": 49_406,
        "eos_id": 49_407,
    }


# --- files of the user ----------------------------------------------------------------------------------------------


def _sentencepiece(path: str, extra_ids: str = "0") -> dict:
    """T5: pad 0, eos 1. A model without a padding id (Llama) gets 0, its unknown symbol, which never occurs there.

    extra_ids: how many sentinels follow the pieces (T5: 100); the last id is <extra_id_0>, the one before <extra_id_1>.
    """
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=path)
    except (RuntimeError, OSError) as e:
        raise UserError(f"{path} is not a SentencePiece model") from e
    known = lambda i: i if i >= 0 else None
    pieces, extra = model.get_piece_size(), _integer(extra_ids, "extra_ids", f"sentencepiece:{path}")
    sentinel = re.compile(f"<extra_id_({'|'.join(map(str, range(extra)))})>")

    def encode(text):
        first, *rest = sentinel.split(text)  # text, then a number and text for each sentinel
        ids = model.encode(first)
        for number, text in zip(rest[::2], rest[1::2], strict=True):
            ids += [pieces + extra - 1 - int(number), *model.encode(text)]
        return ids

    def decode(ids):
        texts = []
        for is_piece, some in itertools.groupby(ids, lambda i: i < pieces):
            some = list(some)
            texts += [model.decode(some)] if is_piece else [f"<extra_id_{pieces + extra - 1 - i}>" for i in some]
        return " ".join(texts)

    return {
        "encode": encode if extra else model.encode,
        "decode": decode if extra else model.decode,
        "vocab_size": pieces + extra,
        "pad_id": max(model.pad_id(), 0),
        "bos_id": known(model.bos_id()),
        "eos_id": known(model.eos_id()),
    }


def wordpiece_model(path: str, cased: bool = False) -> hf.Tokenizer:
    """BERT's, as Transformers builds it from a vocab.txt."""
    pieces = _text(path).removesuffix("\n").split("\n")  # not splitlines: a piece may be an odd line separator
    vocab = {piece: i for i, piece in enumerate(pieces)}
    for special in ("[UNK]", "[PAD]", "[CLS]", "[SEP]"):
        if special not in vocab:
            raise UserError(f"{path} lacks {special}; expected a WordPiece vocabulary, one piece per line")
    model = hf.Tokenizer(hf.models.WordPiece(vocab, unk_token="[UNK]"))
    model.normalizer = hf.normalizers.BertNormalizer(lowercase=not cased)
    model.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
    model.decoder = hf.decoders.WordPiece()
    model.post_processor = hf.processors.BertProcessing(("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
    return model


def _wordpiece(path: str, cased: str = "false") -> dict:
    """[CLS] and [SEP] are BOS and EOS, [PAD] pads."""
    return _from_library(wordpiece_model(path, _truth(cased, f"wordpiece:{path}", "cased")))


def bpe_model(path: str) -> hf.Tokenizer:
    """CLIP's, as Transformers builds it from vocab.json and merges.txt: no HTML unescaped, no encoding mended."""
    merges = pathlib.Path(path).with_name("merges.txt")
    if not merges.is_file():
        raise UserError(f"there is no file {merges}, which belongs to {path}")
    try:
        vocab, pairs = hf.models.BPE.read_file(path, str(merges))
        start, end = (vocab[special] for special in CLIP_SPECIALS)
    except Exception as e:  # the library raises a bare Exception
        raise UserError(f"{path} and {merges.name} are not CLIP's byte pairs: {str(e).splitlines()[0]}") from None
    return clip_model(vocab, pairs, start, end)


def clip_model(vocab: dict[str, int], merges: list[tuple[str, str]], start: int, end: int) -> hf.Tokenizer:
    """Byte pairs under Transformers' `CLIPTokenizer`: NFC, one space for any white space, lower case."""
    unknown = CLIP_SPECIALS[1]
    model = hf.Tokenizer(hf.models.BPE(vocab, merges, unk_token=unknown, end_of_word_suffix="</w>"))
    space = hf.normalizers.Replace(hf.Regex(r"\s+"), " ")
    model.normalizer = hf.normalizers.Sequence([hf.normalizers.NFC(), space, hf.normalizers.Lowercase()])
    words = hf.Regex(rf"<\|startoftext\|>|<\|endoftext\|>|{CLIP_WORDS}")
    model.pre_tokenizer = hf.pre_tokenizers.Sequence(
        [
            hf.pre_tokenizers.Split(words, behavior="removed", invert=True),
            hf.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    model.decoder = hf.decoders.ByteLevel()
    model.add_special_tokens(list(CLIP_SPECIALS))
    around = ((token, i) for token, i in zip(reversed(CLIP_SPECIALS), (end, start), strict=True))
    model.post_processor = hf.processors.RobertaProcessing(*around, trim_offsets=False, add_prefix_space=False)
    return model


def json_model(path: str) -> hf.Tokenizer:
    """The tokenizer of a file of the `tokenizers` library."""
    try:
        return hf.Tokenizer.from_file(path)
    except Exception as e:  # the library raises a bare Exception
        raise UserError(f"{path} is not a tokenizer.json: {str(e).splitlines()[0]}") from e


def _emoji() -> dict:
    return _from_library(json_model(str(VOCAB / "emoji" / "tokenizer.json")))


def _text(path: str) -> str:
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text: {e}") from None


# The names special tokens go by, the first that a vocabulary has counts.
SPECIALS = {
    "pad_id": ("<pad>", "[PAD]", "<|pad|>", "<|endoftext|>"),
    "bos_id": ("<s>", "[CLS]", "<bos>", "<|startoftext|>", "<|begin_of_text|>"),
    "eos_id": ("</s>", "[SEP]", "<eos>", "<|endoftext|>", "<|end_of_text|>"),
}


def special_ids(model: hf.Tokenizer) -> dict[str, int | None]:
    """pad_id, bos_id and eos_id: by the model's own padding and post-processor, else by their usual names.

    Padding and truncation of the model are switched off.
    """
    ids = {key: _first(map(model.token_to_id, names)) for key, names in SPECIALS.items()}
    if model.padding:
        ids["pad_id"] = model.padding["pad_id"]
    model.no_padding()
    model.no_truncation()
    return ids if around(model) is None else ids | dict(zip(("bos_id", "eos_id"), around(model), strict=True))


def around(model: hf.Tokenizer) -> tuple[int | None, int | None] | None:
    """The ids that the post-processor puts before and after a text; None where there is no such processor."""
    if model.post_processor is None or isinstance(model.post_processor, hf.processors.ByteLevel):
        return None
    for text in ("a", "0", "."):  # the first that the vocabulary has
        plain, whole = model.encode(text, add_special_tokens=False).ids, model.encode(text).ids
        if plain:
            break
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    before, after = whole[:start], whole[start + len(plain) :]
    if len(before) > 1 or len(after) > 1:
        raise UserError(f"a tokenizer puts the ids {before} and {after} around a text; expected one on a side at most")
    return _first(before), _first(after)


def _first(values: Iterable[int | None]) -> int | None:
    return next((value for value in values if value is not None), None)


def _from_library(model: hf.Tokenizer) -> dict:
    if model.decoder is None and isinstance(model.model, hf.models.BPE):
        model.decoder = hf.decoders.ByteLevel()
    return special_ids(model) | {
        "encode": lambda text: model.encode(text, add_special_tokens=False).ids,
        "decode": model.decode,
        "vocab_size": max(model.get_vocab(with_added_tokens=True).values()) + 1,
    }


BUILDERS = {
    "clip": _clip,
    "emoji": _emoji,
    "sentencepiece": _sentencepiece,
    "wordpiece": _wordpiece,
    "bpe": lambda path: _from_library(bpe_model(path)),
    "json": lambda path: _from_library(json_model(path)),
}
PACKAGED = ("clip", "emoji")


# --- training -------------------------------------------------------------------------------------------------------


def train(texts: Sequence[str], vocab_size: int) -> str:
    """Returns the `tokenizer.json` text of byte-level byte pairs learnt from `texts` (Sennrich et al. 2016).

    Lower-cased, NFKC; every text can be encoded (bytes stand for what the corpus lacks). <pad> 0, <bos> 1, <eos> 2.
    The vocabulary may turn out smaller than `vocab_size`: a pair must occur twice to become one token.
    """
    if vocab_size < 259:
        raise UserError(f"vocab_size is {vocab_size}; expected >= 259: 256 bytes and 3 specials")
    model = hf.Tokenizer(hf.models.BPE())
    model.normalizer = hf.normalizers.Sequence([hf.normalizers.NFKC(), hf.normalizers.Lowercase()])
    model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=sorted(hf.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    return model.to_str(pretty=True)
