"""SentencePiece models: SigLIP, Gemma, Llama, T5."""

import itertools
import pathlib
import re

import sentencepiece

from vlm_jax.data.tokenizers import guard
from vlm_jax.errors import UserError

MAX_EXTRA_IDS = 10_000


def read(path: str | pathlib.Path) -> sentencepiece.SentencePieceProcessor:
    """Returns the model in a file; raises a UserError if the file holds none."""
    guard.check_file(pathlib.Path(path))
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as e:
        raise UserError(f"{path} is not a SentencePiece model") from e


def fields(path: str, extra_ids: int = 0) -> dict:
    """Returns the fields of a model's tokenizer.

    A model without a padding id (Llama) gets 0, the unknown symbol.

    Args:
      path: the model's file.
      extra_ids: sentinels after the pieces (T5: 100); the last id is <extra_id_0>, the one before it <extra_id_1>.
    """
    model = read(path)
    if extra_ids > MAX_EXTRA_IDS:
        raise UserError(f"{path}: extra_ids is {extra_ids}; expected <= {MAX_EXTRA_IDS}")
    known = lambda i: i if i >= 0 else None
    pieces = model.get_piece_size()
    sentinel = re.compile(f"<extra_id_({'|'.join(map(str, range(extra_ids)))})>")

    def encode(text):
        first, *rest = sentinel.split(text)  # text, then a number and text for each sentinel
        ids = model.encode(first)
        for number, text in zip(rest[::2], rest[1::2], strict=True):
            ids += [pieces + extra_ids - 1 - int(number), *model.encode(text)]
        return ids

    def decode(ids):
        texts = []
        for is_piece, some in itertools.groupby(ids, lambda i: i < pieces):
            some = list(some)
            texts += [model.decode(some)] if is_piece else [f"<extra_id_{pieces + extra_ids - 1 - i}>" for i in some]
        return " ".join(texts)

    return {
        "encode": encode if extra_ids else model.encode,
        "decode": decode if extra_ids else model.decode,
        "vocab_size": pieces + extra_ids,
        "pad_id": max(model.pad_id(), 0),
        "bos_id": known(model.bos_id()),
        "eos_id": known(model.eos_id()),
    }
