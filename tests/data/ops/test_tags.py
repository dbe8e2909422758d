"""Tags of a vocabulary."""

import numpy as np
import pytest

from tests.support.records import run
from vlm_jax.data import tokenizers
from vlm_jax.data.source import BadExample
from vlm_jax.errors import DataError, UserError

RECORD = {"tags": ["#Red_Apple", "fruit", "nice"], "caption": "a red apple, two apples and a pear"}
WORDS = "('apple', 'pear', 'red apple', 'fruit', 'dog', 'cat')"


def test_tags_are_those_of_the_vocabulary():
    hot = run(f"tags({WORDS}, 'tags')", RECORD)["tags"]
    np.testing.assert_array_equal(hot, [False, False, True, True, False, False])
    within = run(f"tags({WORDS}, 'caption', 'tags', within=True, to='k')", RECORD)["k"]
    np.testing.assert_array_equal(within, [False, True, True, True, False, False])
    assert not run(f"tags({WORDS}, 'caption', least=0)", RECORD)["tags"].any()
    with pytest.raises(BadExample, match="tags caption have 0 of 1 in the vocabulary"):
        run(f"tags({WORDS}, 'caption')", RECORD)
    with pytest.raises(BadExample, match="tags none are empty"):
        run(f"tags({WORDS}, 'none')", RECORD)
    assert run("tags('emoji:seen', 'tags')", {"tags": ["banana", "guitar"]})["tags"].sum() == 2


@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_wrong_tags_are_others(n):
    drawn = set()
    for seed in range(40):
        example = run(f"wrong_tags({n}, {WORDS}, 'tags')", RECORD, seed)
        texts = [text for text in example["texts"] if text]
        assert len(texts) == len(set(texts)) == min(n, 4) == example["texts_mask"].sum()
        drawn |= set(texts)
    assert drawn == {"apple", "pear", "dog", "cat"}


def test_a_bag_of_words():
    tokenizer = tokenizers.build("emoji")
    bag = run("caption('c') | bag", {"c": "red apple and red pear"}, 0, tokenizer)["tags"]
    assert bag.shape == (tokenizer.vocab_size,)
    assert {tokenizer.decode([i]) for i in np.flatnonzero(bag)} >= {"red", "apple", "pear"}
    with pytest.raises(UserError, match="op `bag` was given `tags` of type list; expected a text"):
        run("bag('tags')", RECORD, 0, tokenizer)


def test_noise_replaces_a_share():
    record = {"tags": np.arange(1000) < 300}
    assert (run("noisy_tags(0.0)", record)["tags"] == record["tags"]).all()
    noisy = run("noisy_tags(0.3)", record, 1)["tags"]
    assert noisy.sum() == 300 and 60 < noisy[300:].sum() < 120 and record["tags"].sum() == 300
    assert not run("noisy_tags(1.0)", record, 1)["tags"][:300].any()
    with pytest.raises(UserError, match=r"share is 1\.5; expected 0 to 1"):
        run("noisy_tags(1.5)", record, 1)


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        (("cat", "#Cat"), "a vocabulary of tags has `#Cat` twice"),
        (("cat", " "), "a vocabulary of tags has ' '; expected words"),
        ((), "a vocabulary of tags is empty"),
        ("none.txt", "there is no file of classes none.txt"),
    ],
)
def test_wrong_vocabularies_are_named(vocabulary, message):
    with pytest.raises(UserError, match=message) as error:
        run(f"tags({vocabulary!r}, 'tags')", RECORD)
    assert "\n" not in str(error.value)


def test_a_vocabulary_that_matches_nothing_ends_the_run():
    with pytest.raises(DataError, match=r"op `tags`: its words \(Katze, Maus, \.\.\.\) are of no use in 1,000 texts"):
        for _ in range(1000):
            run("tags(('Katze', 'Maus'), 'caption', within=True, least=0)", RECORD)
