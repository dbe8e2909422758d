"""SentencePiece models, against the library."""

import io

import pytest
import sentencepiece

from vlm_jax.data import tokenizers

CORPUS = [f"{adjective} {noun}" for adjective in ("red", "tired", "sacred") for noun in ("fox", "foxes", "boxes")]


@pytest.fixture(scope="module")
def sentencepiece_path(tmp_path_factory):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=18, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        minloglevel=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("spm") / "spm.model"
    path.write_bytes(model.getvalue())
    return path


def test_sentencepiece(sentencepiece_path):
    tokenizer = tokenizers.build(f"sentencepiece:{sentencepiece_path}")
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (18, 0, None, 1)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_path))
    ids = reference.encode("tired fox")
    assert tokenizer.encode("tired fox") == ids
    assert tokenizer("tired fox", 16).tolist() == [[*ids, 1] + [0] * (15 - len(ids))]


def test_options_follow_the_spec(sentencepiece_path):
    siglip = tokenizers.build(f"sentencepiece:{sentencepiece_path}?pad_id=1&lower=true")
    plain = tokenizers.build(f"sentencepiece:{sentencepiece_path}")
    ids = plain.encode("red fox")
    assert siglip.encode("RED Fox") == ids != plain.encode("RED Fox")
    assert siglip("RED Fox", 12).tolist() == [ids + [1] * (12 - len(ids))]
