"""Text ops, and ops on fields."""

import re
import string

import numpy as np
import pytest

from tests.support.records import picture, run
from vlm_jax.data.source import BadExample
from vlm_jax.errors import UserError


class CountingTokenizer:
    """Token = number of letters of each word."""

    pad_id = 0

    def __call__(self, texts, length, bos=True, eos=True):
        ids = np.zeros((len(texts), length), np.int32)
        for row, text in zip(ids, texts, strict=True):
            lengths = [*([98] if bos else []), *map(len, text.split()), *([99] if eos else [])][:length]
            row[: len(lengths)] = lengths
        return ids


def test_captions():
    record = {"name": {"en": " red apple "}, "keywords": {"en": ["fruit", "", "red"]}, "none": "  "}
    assert run('caption("name/en")', record)["text"] == "red apple"
    assert run('caption("keywords/en", join=", ")', record)["text"] == "fruit, red"
    drawn = {run('random_caption("name/en", "keywords/en")', record, seed)["text"] for seed in range(30)}
    assert drawn == {"red apple", "fruit", "red"}
    only = {run('random_caption("name/en", "keywords/en", weights=(1, 0))', record, seed)["text"] for seed in range(9)}
    assert only == {"red apple"}
    joined = {run('random_caption("keywords/en", join=" ")', record, seed)["text"] for seed in range(9)}
    assert joined == {"fruit red", "red fruit"}
    assert run('random_caption("none", "name/fr", "name/en")', record)["text"] == "red apple"
    with pytest.raises(BadExample, match="caption `none` is empty"):
        run('caption("none")', record)
    with pytest.raises(BadExample, match=r"has no field `name/fr` \(there: en\)"):
        run('caption("name/fr")', record)
    for op, expected in (
        ("canonicalize", "a photo of émail’s"),
        ("canonicalize(underscore='drop')", "aphoto of émail’s"),
    ):
        assert run(op, {"text": " A_photo:  of\tÉ-mail’s!"})["text"] == expected
    assert run("canonicalize(lower=False)", {"text": "It's A."})["text"] == "Its A"
    text = run('caption("name/en") | template("A photo of a {}.") | lower', record)["text"]
    assert text == "a photo of a red apple."


def test_several_captions_and_their_tokens():
    record = {"name": {"en": "Red apple"}, "keywords": {"en": ["fruit", "", "to eat"]}, "none": " "}
    out = run("captions(4, 'name/en', 'none', 'name/fr', 'keywords/en')", record)
    assert out["texts"] == ["Red apple", "fruit", "to eat", ""]
    np.testing.assert_array_equal(out["texts_mask"], [True, True, True, False])
    tokens = run(
        "captions(4, 'keywords/en', to='k', ops=lower) | tokenize(4, key='k', to='k')", record, 0, CountingTokenizer()
    )
    np.testing.assert_array_equal(tokens["k"], [[98, 5, 99, 0], [98, 2, 3, 99], [0] * 4, [0] * 4])
    assert tokens["k"].dtype == np.int32
    np.testing.assert_array_equal(tokens["k_mask"], [True, True, False, False])

    drawn = [tuple(run("captions(2, 'name/en', 'keywords/en')", record, seed)["texts"]) for seed in range(30)]
    assert set(drawn) == {("Red apple", "fruit"), ("Red apple", "to eat"), ("fruit", "to eat")}
    assert drawn == [tuple(run("captions(2, 'name/en', 'keywords/en')", record, seed)["texts"]) for seed in range(30)]
    for op in ("captions(2, 'none', 'name/fr')", "captions(2, 'name/en', ops=template(''))"):
        with pytest.raises(BadExample, match="are empty"):
            run(op, record)
    none = run(
        "captions(2, 'none', 'name/fr', least=0) | tokenize(3, key='texts', to='k')", record, 0, CountingTokenizer()
    )
    assert not none["k"].any() and none["k"].shape == (2, 3) and not none["texts_mask"].any()
    with pytest.raises(BadExample, match="captions keywords/en hold 2 of 3 texts"):
        run("captions(4, 'keywords/en', least=3)", record)
    with pytest.raises(UserError, match="was given `keywords/en` of type list; expected a text"):
        run("tokenize(4, key='keywords/en')", record, 0, CountingTokenizer())


def test_tokenize_keep_rename():
    record = {"text": "one three", "concept": 4, "name": {"en": "x"}, "image": picture()}
    tokenizer = CountingTokenizer()
    out = run(
        'tokenize(6) | keep("token_ids", "concept", "name/en") | rename("concept", "label")', record, 0, tokenizer
    )
    np.testing.assert_array_equal(out["token_ids"], [98, 3, 5, 99, 0, 0])
    assert {k: v for k, v in out.items() if k != "token_ids"} == {"label": 4, "en": "x"}
    bare = run("tokenize(3, bos=False, eos=False)", record, 0, tokenizer)
    np.testing.assert_array_equal(bare["token_ids"], [3, 5, 0])
    with pytest.raises(BadExample, match="is empty"):
        run("tokenize(3)", {"text": " "}, 0, tokenizer)


def test_one_of_several_fields_may_be_missing():
    record = {"image": np.ones((2, 2, 3), np.float32), "token_ids": np.array([4, 5], np.int32)}
    seen = [run("missing(0.5, 'image', 'token_ids', fill=7)", record, seed) for seed in range(400)]
    for one in seen:
        assert (one["image"] == (1 if one["image_present"] else 7)).all() and one["image"].dtype == np.float32
        assert one["token_ids"].tolist() == ([4, 5] if one["token_ids_present"] else [7, 7])
    there = np.array([(one["image_present"], one["token_ids_present"]) for one in seen])
    assert there.any(axis=1).all() and np.all(np.abs(there.mean(axis=0) - 0.75) < 0.07)
    assert run("missing(0.0, 'image')", record)["image_present"] is True
    assert run("missing(1.0, 'image')", record)["image_present"] is False and record["image"].all()
    with pytest.raises(UserError, match="`text` is a str; put it after normalize and tokenize"):
        run("missing(1.0, 'text')", {"text": "a"})
    with pytest.raises(UserError, match="was given p=2; expected a probability"):
        run("missing(2, 'image')", record)


def test_draw_takes_one_place_of_lists():
    record = {"questions": {"question": ["how many?", "which colour?"], "answer": ["two", "red"]}}
    drawn = [run("draw('questions')", record, seed)["questions"] for seed in range(20)]
    pairs = {(one["question"], one["answer"]) for one in drawn}
    assert pairs == {("how many?", "two"), ("which colour?", "red")}
    with pytest.raises(BadExample, match="`questions` is empty"):
        run("draw('questions')", {"questions": {"question": [], "answer": []}}, 0)
    with pytest.raises(UserError, match="`text` is not a dict of lists of one length"):
        run("draw('text')", {"text": "a cat"}, 0)


def big_vision(text):
    """`canonicalize_text` of big_vision's prompt_engineering.py."""
    text = text.replace("_", " ").translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\s+", " ", text.lower()).strip()


def siglip(text):
    """`SiglipTokenizer.canonicalize_text` of Transformers, after `do_lower_case`."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\s+", " ", text).strip()


def test_canonical_texts_are_those_of_their_originals():
    texts = (
        "a photo of a Fire_Truck.",
        "ice_cream-cone",
        "__init__",
        " _ ",
        "A_photo:\tÉ-mail’s!",
        "İ",
        "x _ y",
        "_a_",
    )
    for text in texts:
        assert run("canonicalize", {"text": text})["text"] == big_vision(text)
        assert run("canonicalize(underscore='drop')", {"text": text})["text"] == siglip(text)
    assert run("canonicalize", {"text": texts[0]})["text"] == "a photo of a fire truck"


@pytest.mark.parametrize("value", [None, 7, 0.5, True, {"a": 1}, [], [None], [["a cat"]], [7], "", " ", b"a"])
def test_what_is_no_caption_is_a_bad_example(value):
    for op in ("caption('c')", "random_caption('c')", "captions(2, 'c')"):
        with pytest.raises(BadExample, match=r"is empty|are empty|expected a text or a list of texts") as error:
            run(op, {"c": value})
        assert error.value.kind == "text"
    assert run("caption('c')", {"c": [None, "a cat"]})["text"] == "a cat"


def test_templates_are_drawn_anew():
    drawn = {run("random_template('imagenet80')", {"text": "fox"}, seed)["text"] for seed in range(60)}
    assert len(drawn) > 30 and all("fox" in text for text in drawn)
    example = run("random_templates(3, 'a {}', 'the {}', 'my {}', 'no {}')", {"text": "fox"}, 1)
    assert len(set(example["texts"])) == 3 and all(text.endswith(" fox") for text in example["texts"])
    few = run("random_templates(3, 'a {}')", {"text": "fox"}, 1)
    assert few["texts"] == ["a fox", "", ""] and few["texts_mask"].tolist() == [True, False, False]
    with pytest.raises(UserError, match="did you mean `imagenet80`"):
        run("random_template('imagenet81')", {"text": "fox"}, 1)
