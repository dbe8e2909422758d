"""CLIP's byte pairs, against published ids."""

import json

import pytest

from vlm_jax.data import tokenizers
from vlm_jax.data.tokenizers import clip
from vlm_jax.errors import UserError


@pytest.fixture(scope="module")
def packaged():
    return tokenizers.build("clip")


def test_clip_ids_are_openais(packaged):
    assert packaged.vocab_size == 49_408
    assert packaged("a diagram", 6).tolist() == [[49406, 320, 22697, 49407, 0, 0]]
    # ids of open_clip 3.3.0's SimpleTokenizer
    assert packaged.encode("It's 42 — “ﬁne”!") == [585, 568, 275, 273, 2005, 257, 3797, 10377]
    assert packaged.encode("naïve  CAFÉ 日本 \U0001f44d") == [1097, 35689, 563, 15304, 39121, 19277, 361, 4201]


def test_clip_cleans_text(packaged):
    assert clip.clean("  Fish &amp;amp;\n CHIPS\x00 ’ＡＢ’ e\u0301 ") == "fish & chips 'ab' \u00e9"
    assert packaged.encode("") == []
    assert packaged.encode("<|endoftext|>") != [49407], "a caption can't close itself"


def test_bpe_reads_clips_vocabulary_and_merges(tmp_path, packaged):
    """A part of CLIP's: frequent words have its ids."""
    vocab, merges = clip.vocabulary()
    merges = merges[:2000]
    pieces = [*list(vocab)[:512], *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    with pytest.raises(UserError, match=r"there is no file .*merges.txt, which belongs to"):
        tokenizers.build(f"bpe:{tmp_path}/vocab.json")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
    tokenizer = tokenizers.build(f"bpe:{tmp_path}/vocab.json")
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (2514, 2513, 2512, 2513)
    text = "A photo of THE man, with  it's 2 days!"
    ids = packaged.encode(text)
    assert [i for i in ids if i >= 2512] == [], "made by the first two thousand merges"
    assert tokenizer.encode(text) == ids
    assert tokenizer("the", 5).tolist() == [[2512, *packaged.encode("the"), 2513, 2513, 2513]]
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(UserError, match="are not CLIP's byte pairs"):
        tokenizers.build(f"bpe:{tmp_path}/vocab.json")
