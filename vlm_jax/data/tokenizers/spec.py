"""The tokenizer, and the specs that name one."""

import dataclasses
import functools
import urllib.parse
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from vlm_jax import config
from vlm_jax.data.package_files import locate
from vlm_jax.data.tokenizers import clip, guard, library, sentencepiece, wordpiece
from vlm_jax.errors import UserError

REMEMBERED_TEXTS = 2**14  # per tokenizer: class names and captions of small sets come again every epoch
# Each gives a Tokenizer's fields, with `encode` and `decode`.
KINDS = {
    "clip": clip.packaged,
    "emoji": lambda: library.fields(library.from_file(library.EMOJI)),
    "sentencepiece": sentencepiece.fields,
    "wordpiece": lambda path, cased=False: library.fields(wordpiece.from_file(path, cased)),
    "bpe": lambda path: library.fields(clip.from_files(path)),
    "json": lambda path: library.fields(library.from_file(path)),
}
PACKAGED = ("clip", "emoji")
MAX_ID = 2**31 - 1  # ids are int32
IDS = ("pad_id", "bos_id", "eos_id")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Maps texts to ids. Special ids are None if the vocabulary has none. Pickles as its spec."""

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
        with guard.refusing(f"tokenizer `{self.spec}` cannot decode"):
            return self.decode_ids([i for i in ids if i not in special and 0 <= i < self.vocab_size]).strip()

    def __call__(self, texts: str | Sequence[str], length: int, bos: bool = True, eos: bool = True) -> np.ndarray:
        """Returns `[BOS] text [EOS] pad pad ...`, int32 [B, length]; a long text is cut, EOS kept.

        `bos` and `eos` are ignored if the vocabulary has no such id.
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
    """Returns the tokenizer that `spec` names (see `vlm_jax.data.tokenizers`).

    Raises:
      UserError: the spec is unknown, or the file is missing or of another kind.
    """
    head, _, query = spec.partition("?")
    kind, _, path = head.partition(":")
    builder = config.choose(KINDS, kind, "the tokenizer spec")
    if kind in PACKAGED:
        if path:
            raise UserError(f"tokenizer spec `{spec}`: `{kind}` is packaged and takes no path; write `{kind}`")
    elif not path:
        raise UserError(f"tokenizer spec `{spec}` names no file; expected `{kind}:/path/to/file`")
    elif not locate(path).is_file():
        raise UserError(f"tokenizer spec `{spec}`: there is no file {locate(path)}")
    options = _options(spec, query)
    lower = options.pop("lower", False)
    ids = {key: options.pop(key) for key in IDS if key in options}
    if path:
        options["path"] = str(locate(path))
    with guard.refusing(f"tokenizer spec `{spec}`"):
        fields = config.call(builder, options, f"tokenizer spec `{spec}`") | ids
    encode, decode = guard.guarded(fields.pop("encode"), spec), fields.pop("decode")
    if not 0 < fields["vocab_size"] <= MAX_ID or any((fields[key] or 0) > MAX_ID for key in IDS):
        raise UserError(f"tokenizer spec `{spec}` has {fields['vocab_size']:,} ids; expected 1 to {MAX_ID:,}")
    return Tokenizer(
        spec=spec,
        decode_ids=decode,
        encode_text=functools.lru_cache(REMEMBERED_TEXTS)(lambda text: encode(text.lower() if lower else text)),
        **fields,
    )


def _options(spec: str, query: str) -> dict:
    """Reads `pad_id=1&lower=true`; keys that are unknown here keep their text."""
    options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    for key, value in options.items():
        if key in ("lower", "cased"):
            if value.lower() not in ("true", "false"):
                raise UserError(f"tokenizer spec `{spec}`: {key} is `{value}`; expected true or false")
            options[key] = value.lower() == "true"
        elif key in (*IDS, "extra_ids"):
            if not value.isdecimal() or len(value) > 10:
                raise UserError(f"tokenizer spec `{spec}`: {key} is `{value}`; expected a whole number")
            options[key] = int(value)
    return options
