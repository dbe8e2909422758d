"""BERT's WordPiece."""

from vlm_jax.data import tokenizers


def test_wordpiece(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "fox", "##es", "run", "##ning", "!"]))
    tokenizer = tokenizers.build(f"wordpiece:{path}")
    assert tokenizer("The FOXES running! zebra", 10).tolist() == [[2, 4, 5, 6, 7, 8, 9, 1, 3, 0]]
    assert tokenizer("the fox", 4, eos=False).tolist() == [[2, 4, 5, 0]]

    lines = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "\u2028", "Fox"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    cased = tokenizers.build(f"wordpiece:{path}?cased=true")
    assert cased.vocab_size == 7, "an odd line separator is a piece"
    assert cased("the Fox", 4).tolist() == [[2, 4, 6, 3]]
    assert tokenizers.build(f"wordpiece:{path}")("the Fox", 4).tolist() == [[2, 4, 1, 3]]
