"""Files of the `tokenizers` library: their specials and padding; the packaged one."""

import pytest
import tokenizers as hf

from vlm_jax.data import tokenizers
from vlm_jax.errors import UserError


@pytest.mark.parametrize(
    ("single", "bos", "eos"),
    [(["[B]", "$A", "[E]"], 1, 2), (["$A", "[E]"], None, 2), (["[B]", "$A"], 1, None), (["$A"], None, None)],
)
def test_json_honours_its_post_processor(single, bos, eos, tmp_path):
    """Over the usual names (<s>, </s>), which count without one; so does its padding, which is not done twice."""
    vocab = {"<pad>": 0, "[B]": 1, "[E]": 2, "<s>": 3, "</s>": 4, "red": 5, "fox": 6, "?": 7, "a": 8}
    model = hf.Tokenizer(hf.models.WordLevel(vocab, unk_token="?"))
    model.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    model.save(str(tmp_path / "plain.json"))
    model.post_processor = hf.processors.TemplateProcessing(single=single, special_tokens=[("[B]", 1), ("[E]", 2)])
    model.enable_padding(length=12, pad_id=7, pad_token="?")
    model.enable_truncation(4)
    model.save(str(tmp_path / "wrapped.json"))
    plain, wrapped = (tokenizers.build(f"json:{tmp_path}/{name}.json") for name in ("plain", "wrapped"))
    assert (plain.pad_id, plain.bos_id, plain.eos_id) == (0, 3, 4)
    assert (wrapped.pad_id, wrapped.bos_id, wrapped.eos_id) == (7, bos, eos)
    expected = [i for i in (bos, 5, 6, 5, 6, eos) if i is not None]
    assert wrapped("red fox red fox", 6).tolist() == [expected + [7] * (6 - len(expected))]


def test_json_with_two_specials_on_a_side_is_refused(tmp_path):
    model = hf.Tokenizer(hf.models.WordLevel({"a": 0, "[B]": 1}, unk_token="a"))
    model.post_processor = hf.processors.TemplateProcessing(single=["[B]", "[B]", "$A"], special_tokens=[("[B]", 1)])
    model.save(str(tmp_path / "two.json"))
    with pytest.raises(UserError, match=r"puts the ids \[1, 1\] and \[\] around a text"):
        tokenizers.build(f"json:{tmp_path}/two.json")


def test_emoji_knows_the_training_words_only():
    tokenizer = tokenizers.build("emoji")
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (2985, 0, 1, 2)
    assert tokenizer("Red APPLE", 4, bos=False, eos=False).tolist() == [[524, 1814, 0, 0]]
    assert len(tokenizer.encode("hippopotamus")) > 3, "a held-out concept's own word is in pieces"
