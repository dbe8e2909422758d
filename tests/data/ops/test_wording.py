"""Ops that make texts of a text."""

import itertools
import json

import numpy as np
import pytest

from tests.support.records import run
from vlm_jax.data import english, loader, ops, tokenizers
from vlm_jax.data.source import BadExample
from vlm_jax.errors import DataError, UserError

FOX = {"caption": "two red foxes and a dog"}


def test_hard_negatives_take_turns_among_kinds():
    kinds = {"red": "attribute", "two": "count", "dog": "object"}
    for seed in range(10):
        example = run("caption('caption') | hard_negatives(3)", FOX, seed)
        gone = [word for text in example["texts"] for word in kinds if word not in text.split()]
        assert len({kinds[word] for word in gone}) == len(gone) >= 2
        assert example["text"] == FOX["caption"] and FOX["caption"] not in example["texts"]
    few = run(
        "caption('caption') | hard_negatives(4, kinds=('attribute',), words={'attribute': ('red; blue',)})", FOX, 0
    )
    assert few["texts"] == ["two blue foxes and a dog", "", "", ""]
    np.testing.assert_array_equal(few["texts_mask"], [True, False, False, False])


def test_each_runs_ops_on_every_text():
    texts = run("each('t', lower | random_template('a {}', 'the {}'))", {"t": ["Fox", "", "Owl"]}, 1)["t"]
    assert texts[1] == "" and {text.split()[1] for text in texts if text} == {"fox", "owl"}
    with pytest.raises(UserError, match="op `each` was given `text` of type str; expected a list of texts"):
        run("each('text', lower)", {"text": "a"}, 0)


def test_triples_are_token_ids_of_their_parts():
    tokenizer = tokenizers.build("emoji")
    text = {"caption": "a red fox to the left of two owls"}
    ids = run("caption('caption') | triples(3, 4)", text, 0, tokenizer)["triples"]
    assert ids.shape == (3, 3, 4) and ids.dtype == np.int32 and not ids[2].any()
    assert [[tokenizer.decode(part) for part in triple] for triple in ids[:2]] == [
        ["fox", "left of", "owls"], ["fox", "is", "red"],
    ]  # fmt: skip
    assert not run("caption('caption') | triples(3, 4)", {"caption": "hello"}, 0, tokenizer)["triples"].any()


def test_the_data_s_own_false_texts_come_first():
    record = FOX | {"foils": {"object": "two red owls and a dog", "attribute": None, "order": FOX["caption"]}}
    for seed in range(5):
        texts = run("caption('caption') | hard_negatives(2, foils='foils')", record, seed)["texts"]
        assert texts[0] == "two red owls and a dog" != texts[1] != ""


def test_facts_leave_out_what_may_be_true():
    record = FOX | {"objects": {"name": ["fox", "fox", "dog", "owl"], "attributes": [["red"], ["red"], [], []]}}
    op = "caption('caption') | hard_negatives(9, kinds=('count',), objects='objects')"
    texts = run(op, record | {"objects": {"name": ["fox", "fox", "dog"]}}, 0)["texts"]
    assert all(texts[:8]) and "two" not in " ".join(texts)
    with pytest.raises(BadExample, match="`objects` holds no columns of objects"):
        run(op, record | {"objects": 3}, 0)


def test_what_is_wrong_is_named():
    with pytest.raises(BadExample, match="`text` has 0 of 1 hard negatives"):
        run("caption('c') | hard_negatives(1, least=1)", {"c": "ein Hund"}, 0)
    with pytest.raises(UserError, match=r"given kinds=\('objects',\); expected some of: object, attribute"):
        ops.parse("caption('caption') | hard_negatives(1, kinds=('objects',))", None)
    with pytest.raises(UserError, match="was given `c` of type list; expected a text: use `caption` first"):
        run("hard_negatives(1, key='c')", {"c": ["a", "b"]}, 0)
    with pytest.raises(BadExample, match="has no field `facts`"):
        run("caption('caption') | hard_negatives(1, objects='facts')", FOX, 0)


def test_words_that_match_nothing_end_the_run(tmp_path):
    """One line, after a thousand texts; the data are not bad."""
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"c": f"ein roter Hund {i}"}) + "\n" for i in range(1200)))
    op = "caption('c') | hard_negatives(1, words={'object': ('Katze; Maus',)}) | keep('text', 'texts')"
    message = r"op `hard_negatives`: its words \(Katze, \.\.\.\) are of no use in 1,000 texts; give words of these"
    with pytest.raises(DataError, match=message) as error:
        for _ in itertools.islice(loader.train_loader(uri=f"jsonl:{path}", ops=op, batch_size=100), 12):
            pass
    assert "\n" not in str(error.value)
    of_use = english.Tried("hard_negatives", ["Hund"])
    for i in range(1500):  # of use once: the words belong to the data
        of_use(i == 7)


def test_paraphrases_are_other_wordings_and_keywords():
    record = {"c": "an image of a big car and a sofa", "keywords": ["vehicle", "an image of a big car and a sofa"]}
    seen = set()
    for seed in range(30):
        example = run("caption('c') | paraphrases(2)", record, seed)
        seen |= {*example["texts"]} - {""}
        assert record["c"] not in example["texts"] and len(set(example["texts"])) == 2
    sizes, cars, sofas = ("big", "large"), ("car", "automobile"), ("sofa", "couch")
    texts = {f"an image of a {one} {two} and a {three}" for one in sizes for two in cars for three in sofas}
    assert seen == texts - {record["c"]}
    pool = {*run("caption('c') | paraphrases(20, 'keywords', 'none')", record, 0)["texts"]}
    assert pool == seen | {"vehicle", ""}
    assert run("caption('c') | paraphrases(1)", {"c": "A photo"}, 0)["texts"] == ["A photograph"]
    with pytest.raises(BadExample, match="`text` has 0 of 1 paraphrases"):
        run("caption('c') | paraphrases(1, least=1)", {"c": "a rat"}, 0)


def test_shear_cuts_to_the_words_of_the_caption():
    record = {"text": "a red fox", "texts": ["one two three four", "one  two", "", "a b c"], "long": "a b c d e f"}
    assert run("shear", record)["texts"] == ["one two three", "one  two", "", "a b c"]
    assert run("shear | shear", record)["texts"] == run("shear", record)["texts"]
    assert run("shear(length=1)", record)["texts"] == ["one", "one", "", "a"]
    assert run("shear(like='long')", record)["texts"] == record["texts"]  # none is longer
    drawn = {
        run("random_caption('text', 'long') | shear(key='text', like='long')", record, s)["text"] for s in range(9)
    }
    assert drawn == {"a red fox", "a b c d e f"}
    with pytest.raises(BadExample, match="caption `none` is empty"):
        run("shear(like='none')", record | {"none": []})
    with pytest.raises(UserError, match="op `shear` was given `n` of type int; expected a text or a list"):
        run("shear(key='n')", record | {"n": 3})


def test_views_of_a_text_lack_words_and_have_others_in_their_place():
    words = list("abcdefgh")
    texts = [
        text for seed in range(60) for text in run("text_views(2, drop=0.25)", {"text": " ".join(words)}, seed)["texts"]
    ]
    assert all(set(text.split()) <= set(words) for text in texts)
    assert 0.2 < 1 - np.mean([len(text.split()) for text in texts]) / len(words) < 0.3
    swapped = run("text_views(4, drop=0.0)", {"text": " ".join(words)}, 1)["texts"]
    moved = [sum(a != b for a, b in zip(text.split(), words, strict=True)) for text in swapped]
    assert set(moved) <= {0, 2} and any(moved)
    same = run("text_views(2, drop=0.0, swaps=0, to='two')", {"text": "a b"})
    assert same["two"] == ["a b", "a b"] and same["two_mask"].tolist() == [True, True]
    assert run("text_views(1, drop=1.0)", {"text": "cat"})["texts"] == ["cat"]
    with pytest.raises(UserError, match=r"drop=1\.5; expected a probability, 0 to 1"):
        run("text_views(1, drop=1.5)", {"text": "cat"})
