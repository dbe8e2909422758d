"""CLIP's byte pairs (Radford et al. 2021, arXiv:2103.00020): the packaged ones, or Transformers' vocab.json."""

import functools
import gzip
import html
import pathlib
import re
import unicodedata

import tokenizers as hf

from vlm_jax.data.tokenizers import guard
from vlm_jax.errors import UserError

MERGES = pathlib.Path(__file__).parent / "vocab" / "clip" / "bpe_simple_vocab_16e6.txt.gz"
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
SPECIALS = ("<|startoftext|>", "<|endoftext|>")

# The part of CLIP's ftfy step that is needed without mis-decoded text: straight quotes, plain letters for ligatures and
# full-width forms, no control characters, NFC. (Repair of mis-decoded text, "CafÃ©", is not included.)
_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]")
_WIDE = (0x3000, *range(0xFF01, 0xFFF0))
_LIGATURES = (0x0132, 0x0133, *range(0x01C4, 0x01CD), *range(0x01F1, 0x01F4), *range(0xFB00, 0xFB07))
_PLAIN = {c: unicodedata.normalize("NFKC", chr(c)) for c in (*_WIDE, *_LIGATURES)}
_PLAIN |= {0x0149: "'n"} | dict.fromkeys((0x02BC, *range(0x2018, 0x201C)), "'")
_PLAIN |= dict.fromkeys(range(0x201C, 0x2020), '"')


def clean(text: str) -> str:
    """Returns `text` as CLIP's byte pairs expect it: `repaired`, in lower case."""
    return repaired(text).lower()


def repaired(text: str) -> str:
    """Returns `text` with HTML unescaped, plain characters and single spaces."""
    text = _CONTROL.sub("", html.unescape(html.unescape(text)))
    if not text.isascii():
        text = unicodedata.normalize("NFC", text.translate(_PLAIN))
    return " ".join(text.split())


def _byte_alphabet() -> list[str]:
    """Returns the 256 printable stand-ins for bytes, in CLIP's order: bytes that print first, then the rest."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Returns OpenAI's pieces with their ids, without the two specials at the end, and the merges."""
    lines = gzip.decompress(MERGES.read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49_152 - 256 - 2 + 1]]  # 49,152 = vocabulary before </w> bytes
    alphabet = _byte_alphabet()
    pieces = [*alphabet, *(c + "</w>" for c in alphabet), *map("".join, merges)]
    return {piece: i for i, piece in enumerate(pieces)}, merges


@functools.cache
def _packaged_model() -> hf.Tokenizer:
    model = hf.Tokenizer(hf.models.BPE(*vocabulary(), end_of_word_suffix="</w>"))
    words = hf.Regex(WORDS)
    model.pre_tokenizer = hf.pre_tokenizers.Sequence(
        [
            hf.pre_tokenizers.Split(words, behavior="removed", invert=True),
            hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = hf.decoders.ByteLevel()
    return model


def packaged() -> dict:
    """Returns the fields of OpenAI's tokenizer: <|startoftext|> and <|endoftext|> are BOS and EOS, 0 pads."""
    model = _packaged_model()
    return {
        "encode": lambda text: model.encode(clean(text)).ids,
        "decode": lambda ids: model.decode(ids).replace("</w>", " "),
        "vocab_size": 49_408,
        "pad_id": 0,
        "bos_id": 49_406,
        "eos_id": 49_407,
    }


def from_files(path: str) -> hf.Tokenizer:
    """Returns the tokenizer that Transformers builds from vocab.json and merges.txt.

    HTML and encodings stay unchanged.

    Raises:
      UserError: merges.txt is missing, or the files are not CLIP's byte pairs.
    """
    merges = pathlib.Path(path).with_name("merges.txt")
    if not merges.is_file():
        raise UserError(f"there is no file {merges}, which belongs to {path}")
    for file in (pathlib.Path(path), merges):
        guard.check_file(file)
    with guard.refusing(f"{path} and {merges.name} are not CLIP's byte pairs"):
        vocab, pairs = hf.models.BPE.read_file(path, str(merges))
        start, end = (vocab[special] for special in SPECIALS)
        return from_pairs(vocab, pairs, start, end)


def from_pairs(vocab: dict[str, int], merges: list[tuple[str, str]], start: int, end: int) -> hf.Tokenizer:
    """Returns byte pairs under the rules of Transformers' `CLIPTokenizer`: NFC, single spaces, lower case."""
    unknown = SPECIALS[1]
    model = hf.Tokenizer(hf.models.BPE(vocab, merges, unk_token=unknown, end_of_word_suffix="</w>"))
    space = hf.normalizers.Replace(hf.Regex(r"\s+"), " ")
    model.normalizer = hf.normalizers.Sequence([hf.normalizers.NFC(), space, hf.normalizers.Lowercase()])
    words = hf.Regex(rf"<\|startoftext\|>|<\|endoftext\|>|{WORDS}")
    model.pre_tokenizer = hf.pre_tokenizers.Sequence(
        [
            hf.pre_tokenizers.Split(words, behavior="removed", invert=True),
            hf.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    model.decoder = hf.decoders.ByteLevel()
    model.add_special_tokens(list(SPECIALS))
    around = ((token, i) for token, i in zip(reversed(SPECIALS), (end, start), strict=True))
    model.post_processor = hf.processors.RobertaProcessing(*around, trim_offsets=False, add_prefix_space=False)
    return model
