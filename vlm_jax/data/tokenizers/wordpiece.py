"""BERT's WordPiece."""

import pathlib

import tokenizers as hf

from vlm_jax.data.tokenizers import guard
from vlm_jax.errors import UserError


def from_file(path: str, cased: bool = False) -> hf.Tokenizer:
    """Returns the tokenizer that Transformers builds from BERT's vocab.txt: [CLS] text [SEP].

    Raises:
      UserError: the file is not UTF-8, or lacks a special piece.
    """
    guard.check_file(pathlib.Path(path))
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text: {e}") from None
    pieces = text.removesuffix("\n").split("\n")  # not splitlines: a piece may be an odd line separator
    vocab = {piece: i for i, piece in enumerate(pieces)}
    for special in ("[UNK]", "[PAD]", "[CLS]", "[SEP]"):
        if special not in vocab:
            raise UserError(f"{path} lacks {special}; expected a WordPiece vocabulary, one piece per line")
    with guard.refusing(f"{path} is not a WordPiece vocabulary"):
        model = hf.Tokenizer(hf.models.WordPiece(vocab, unk_token="[UNK]"))
    model.normalizer = hf.normalizers.BertNormalizer(lowercase=not cased)
    model.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
    model.decoder = hf.decoders.WordPiece()
    model.post_processor = hf.processors.BertProcessing(("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
    return model
