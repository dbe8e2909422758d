"""Tokenizers of the `tokenizers` library: read from a tokenizer.json, and converted to our fields."""

import pathlib
from collections.abc import Iterable

import tokenizers as hf

from vlm_jax.data.tokenizers import guard
from vlm_jax.errors import UserError

EMOJI = pathlib.Path(__file__).parent / "vocab" / "emoji" / "tokenizer.json"
# The usual names of special tokens; the first name in the vocabulary is used.
SPECIALS = {
    "pad_id": ("<pad>", "[PAD]", "<|pad|>", "<|endoftext|>"),
    "bos_id": ("<s>", "[CLS]", "<bos>", "<|startoftext|>", "<|begin_of_text|>"),
    "eos_id": ("</s>", "[SEP]", "<eos>", "<|endoftext|>", "<|end_of_text|>"),
}


def from_file(path: str | pathlib.Path) -> hf.Tokenizer:
    """Returns the tokenizer of a file of the `tokenizers` library."""
    path = pathlib.Path(path)
    guard.check_file(path)
    guard.check_json(path)
    with guard.refusing(f"{path} is not a tokenizer.json"):
        model = hf.Tokenizer.from_file(str(path))
    guard.check_speed(lambda text: model.encode(text, add_special_tokens=False), path)
    return model


def fields(model: hf.Tokenizer) -> dict:
    """Returns the fields of a tokenizer; byte pairs without a decoder get one for bytes."""
    if model.decoder is None and isinstance(model.model, hf.models.BPE):
        model.decoder = hf.decoders.ByteLevel()
    return special_ids(model) | {
        "encode": lambda text: model.encode(text, add_special_tokens=False).ids,
        "decode": model.decode,
        "vocab_size": max(model.get_vocab(with_added_tokens=True).values(), default=-1) + 1,
    }


def special_ids(model: hf.Tokenizer) -> dict[str, int | None]:
    """Returns pad_id, bos_id and eos_id, and switches the model's padding and truncation off.

    The model's own padding and post-processor decide, else the usual names.
    """
    ids = {key: _first(map(model.token_to_id, names)) for key, names in SPECIALS.items()}
    if model.padding:
        ids["pad_id"] = model.padding["pad_id"]
    model.no_padding()
    model.no_truncation()
    return ids if around(model) is None else ids | dict(zip(("bos_id", "eos_id"), around(model), strict=True))


def around(model: hf.Tokenizer) -> tuple[int | None, int | None] | None:
    """Returns the ids that the post-processor puts before and after a text; None without a post-processor."""
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
