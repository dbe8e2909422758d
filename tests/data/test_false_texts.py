"""Hard negatives by rules, over many captions of scenes; their truth is checked by a grammar of the tests' own."""

import collections

import numpy as np
import pytest

from tests.support import scene_truth
from vlm_jax.data import english, false_texts, phrases
from vlm_jax.data.scenes import words as scene_words
from vlm_jax.data.sources import open_source
from vlm_jax.errors import UserError

SCENES = 90
NUMBERS = english.LISTS["count"][0].split("; ")
FURNITURE = ("chairs", "beds", "tables", "desks", "benches", "toilets", "sinks", "ovens", "refrigerators", "toasters",
             "lamps", "mirrors")  # fmt: skip


@pytest.fixture(scope="module")
def records():
    source = open_source("scenes:?size=32&objects=1-6", "train")
    source = source.narrow(frozenset(["caption", "objects", "relations"]))
    return [source[i] for i in range(SCENES)]


@pytest.fixture(scope="module")
def words():
    """The words that scenes use, so that every false text can be read."""
    things = [thing.name for thing in scene_words.things() if thing.name != "orange"]
    return english.Words(
        {
            "object": ("; ".join(things),),
            "attribute": ("red; yellow; green; blue; purple; grey", "big; small", "upside-down; tilted"),
            "relation": ("to the left of; to the right of", "above; below", "bigger than; smaller than"),
            "count": ("two; three; four; five; six",),
        }
    )


def one_word_changed(text, kind, words):
    """All texts in which one word of a kind is replaced by an entry that excludes it, in its number."""
    changed = set()
    for match in words.find(text):
        if match.kind == kind:
            i, own, _ = match.place
            entries = [entry for j, entry in enumerate(words.lists[kind][i]) if j != own]
            others = [english.plural(word) if match.many else word for entry in entries for word in entry]
            changed |= {text[: match.start] + other + text[match.end :] for other in others}
    return changed


@pytest.mark.parametrize("kind", false_texts.KINDS)
def test_false_by_the_facts_and_by_the_promised_words(kind, records, words):
    """A single word, of the same list, is another; or the words have another order."""
    found = 0
    for i, record in enumerate(records):
        facts = false_texts.Facts(record["objects"], record["relations"])
        text = record["caption"]
        made = false_texts.draw(text, [kind], 4, words, np.random.default_rng(i), facts)
        assert len(set(made)) == len(made) and text not in made
        for false in made:
            assert not scene_truth.is_true(false, record["objects"]), (text, false)
            assert scene_truth.is_english(false), (text, false)
            if kind == "order":
                assert sorted(english.TOKEN.findall(text)) == sorted(english.TOKEN.findall(false))
            else:
                assert false in one_word_changed(text, kind, words)
        found += len(made)
    assert found > SCENES / 4, "few captions were changed"


def test_without_facts_the_packaged_words_change_most_captions(records):
    known, sizes = english.words(), collections.Counter()
    for i, record in enumerate(records):
        made = false_texts.draw(record["caption"], false_texts.KINDS, 3, known, np.random.default_rng(i))
        assert record["caption"] not in made and len(set(made)) == len(made)
        sizes[len(made)] += 1
    assert sizes[3] > 0.6 * SCENES


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("A man riding a horse.", "order", {"A horse riding a man."}),
        ("a dog near a cat", "order", set()),  # holds both ways
        ("a black dog and a white cat", "order", {"a white dog and a black cat"}),
        ("an old car and a young man", "order", set()),  # the article would be wrong
        ("the dog left of the house", "relation", {"the dog right of the house"}),
        ("three dogs", "count", {f"{n} dogs" for n in NUMBERS if n != "three"}),
        ("a photo of a wooden dog house", "object", set()),  # not the dog
        ("Two sofas", "object", {f"Two {n}" for n in FURNITURE}),
        ("ein roter Hund", "attribute", set()),
        ("", "object", set()),
    ],
)  # fmt: skip
def test_changes_by_hand(text, kind, expected):
    assert set(false_texts.draw(text, [kind], 50, english.words(), np.random.default_rng(0))) == expected


def test_facts_deny_only_what_is_surely_false():
    words = english.words()
    objects = {"name": ["dog", "cat", "cat"], "attributes": [["red"], [], ["blue"]]}
    facts = false_texts.Facts(objects, {"subject": [0], "relation": ["left"], "object": [1]})
    claim = lambda *parts: facts.deny(false_texts.Claim(*parts), words)
    assert claim("object", ("dog",), "horse") and not claim("object", ("dog",), "cats")
    assert claim("attribute", ("dog",), "green") and not claim("attribute", ("cats",), "blue")
    assert not claim("attribute", ("horse",), "green")  # of a horse nothing is known
    assert claim("count", ("cats",), "five") and not claim("count", ("cats",), "two")
    assert not claim("relation", ("dog", "cat"), "right of")  # which cat?
    one = false_texts.Facts({"name": ["dog", "cat"]}, {"subject": [0], "relation": ["left"], "object": [1]})
    assert one.deny(false_texts.Claim("relation", ("dog", "cat"), "right of"), words)
    assert one.deny(false_texts.Claim("relation", ("cat", "dog"), "to the left of"), words)
    assert not one.deny(false_texts.Claim("relation", ("cat", "dog"), "right of"), words)  # the converse holds
    assert not one.deny(false_texts.Claim("attribute", ("dog",), "red"), words)  # no attributes are known
    assert not false_texts.Facts(objects).deny(false_texts.Claim("relation", ("dog", "dog"), "below"), words)


def test_triples():
    words = english.words()
    text = "a big red fox to the left of two owls that are tilted. A man is riding a horse."
    assert phrases.triples(text, words) == [
        ("fox", "left of", "owls"), ("man", "riding", "horse"),
        ("fox", "is", "big"), ("fox", "is", "red"), ("owls", "is", "tilted"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"things": ("cat; dog",)}, "no words of the kind `things`; expected some of: object, attribute"),
        ({"object": ("cat; dog; cat",)}, "the lists of words have `cat` twice"),
        ({"object": ("cat; ; dog",)}, "a list of words of the kind `object` has an empty entry"),
        ({"object": (3,)}, "words of the kind `object` are 3; expected texts such as 'red; green; blue'"),
    ],
)
def test_wrong_lists_are_named(lists, message):
    with pytest.raises(UserError, match=message) as error:
        english.words(lists)
    assert "\n" not in str(error.value)
