"""What is said of a scene: captions, sentences, tags. Every text is true of the picture, in several wordings.

A text is a list of `Word`s, each with the fact that it states, so that a foil (foils.py) can change exactly one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from vlm_jax.data.scenes.scene import Look, Scene, below, pick
from vlm_jax.data.scenes.words import article

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
# Words of a relation and of its converse, and how it stands between its two things.
RELATION = {
    "left": (("left", "right"), "to the {} of"),
    "above": (("above", "below"), "{}"),
    "inside": (("inside", "around"), "{}"),
    "bigger": (("bigger", "smaller"), "{} than"),
}


class Word(NamedTuple):
    """A word, or a name of several words.

    Attributes:
      role: what it states: "name", "size", "turn", "colour", "count", "relation", "article", or "" for none.
      of: index of the look that it speaks of.
      after: a comma or nothing.
    """

    text: str
    role: str = ""
    of: int = -1
    after: str = ""


def text(words: Sequence[Word]) -> str:
    """Returns the words as a text; `a` and `an` follow from the word behind them."""
    out = []
    for i, word in enumerate(words):
        out.append((article(words[i + 1].text) if word.role == "article" else word.text) + word.after)
    return " ".join(out)


def sentence(words: Sequence[Word]) -> str:
    """Returns the words as a sentence."""
    plain = text(words)
    return plain[0].upper() + plain[1:] + "."


def plain(words: str) -> list[Word]:
    """Returns words that state nothing."""
    return [Word(word) for word in words.split()]


def phrase(
    scene: Scene, group: int, rng: random.Random, *, definite: bool = False, without: Sequence[str] = ()
) -> list[Word]:
    """Returns the noun phrase of a look: "a big red fox", "two owls that are tilted", "the fox".

    Args:
      scene: the scene.
      group: index in `scene.looks`.
      rng: decides the place of "upside-down" and "tilted".
      definite: with "the" and, for one thing, without attributes.
      without: attributes that are left out: "size", "turn", "colour".
    """
    look, count = scene.looks[group], scene.counts[group]
    name = Word(look.thing.name if count == 1 else look.thing.plural, "name", group)
    if definite:
        return [Word("the"), name]
    first = [Word("a", "article")] if count == 1 else [Word(NUMBERS[count], "count", group)]
    said = {role: getattr(look, role) for role in ("size", "turn", "colour") if role not in without}
    attributes = {role: Word(a, role, group) for role, a in said.items() if a}
    behind = rng.random() < 0.3 and attributes.pop("turn", None)
    tail = [*plain("that is" if count == 1 else "that are"), behind] if behind else []
    return [*first, *attributes.values(), name, *tail]


def listed(parts: Sequence[list[Word]]) -> list[Word]:
    """Returns phrases joined by commas and "and"."""
    words = []
    for i, part in enumerate(parts):
        if i == len(parts) - 1 and i:
            words.append(Word("and"))
        words += part
        if i < len(parts) - 2:
            words[-1] = words[-1]._replace(after=",")
    return words


def singles(scene: Scene) -> list[int]:
    """Returns the objects that are the only one of their look, in the order of the looks."""
    place = {o.group: i for i, o in enumerate(scene.objects)}
    return [place[group] for group, count in enumerate(scene.counts) if count == 1]


def stated_relations(scene: Scene) -> list[tuple[int, str, int]]:
    """Returns the relations between objects that a name alone tells apart."""
    named = {*singles(scene)}
    return [(i, name, j) for i, name, j in scene.relations if i in named and j in named]


def related(scene: Scene, relation: tuple[int, str, int], rng: random.Random, definite: bool) -> tuple:
    """Returns (first phrase, words of the relation, second phrase), from either side but for "inside"."""
    i, name, j = relation
    forward = name == "inside" or rng.random() < 0.5
    (ahead, converse), form = RELATION[name]
    before, _, after = form.partition("{}")
    groups = [scene.objects[k].group for k in ((i, j) if forward else (j, i))]
    without = ("size",) if name == "bigger" else ()
    a, b = (phrase(scene, group, rng, definite=definite, without=without) for group in groups)
    middle = [*plain(before), Word(ahead if forward else converse, "relation", groups[0]), *plain(after)]
    return a, middle, b


def caption_words(scene: Scene) -> list[Word]:
    """Returns the short caption: a relation of two things, or the list of all."""
    rng = scene.random("caption")
    stated = stated_relations(scene)
    if stated and rng.random() < 0.6:
        inside = [relation for relation in stated if relation[1] == "inside"]
        a, middle, b = related(scene, pick(rng, inside or stated), rng, definite=False)
        body = [*a, *(plain("that is") if middle[0].text in ("bigger", "smaller") else []), *middle, *b]
    else:
        groups = shuffled(rng, range(len(scene.looks)))
        body = listed([phrase(scene, group, rng) for group in groups])
    before = pick(rng, ("", "", "a picture of", "a drawing of", "an image of"))
    return [*plain(before), *body]


def shuffled(rng: random.Random, values: Sequence) -> list:
    """Returns the values in an order that `random()` alone decides."""
    values = list(values)
    for i in range(len(values) - 1, 0, -1):
        j = below(rng, i + 1)
        values[i], values[j] = values[j], values[i]
    return values


def caption(scene: Scene) -> str:
    """Returns the short caption, see `caption_words`."""
    return text(caption_words(scene))


def sub_captions(scene: Scene) -> list[str]:
    """Returns a sentence on each look, then one on each relation."""
    rng = scene.random("sentences")
    sentences = []
    for group, count in enumerate(scene.counts):
        words = phrase(scene, group, rng)
        begin, end = pick(rng, FORMS[count > 1])
        sentences.append(sentence([*plain(begin), *words, *plain(end)]))
    for relation in stated_relations(scene):
        a, middle, b = related(scene, relation, rng, definite=True)
        sentences.append(sentence([*a, Word("is"), *middle, *b]))
    return sentences


FORMS = (
    (("there is", ""), ("the picture shows", ""), ("", "can be seen"), ("one can see", "")),
    (("there are", ""), ("the picture shows", ""), ("", "can be seen"), ("one can see", "")),
)


def long_caption(scene: Scene) -> str:
    """Returns all sentences, in a drawn order."""
    return " ".join(shuffled(scene.random("long_caption"), sub_captions(scene)))


def names(scene: Scene) -> dict[str, list[str]]:
    """Returns language -> the names of the things."""
    languages = scene.looks[0].thing.names
    return {language: [look.thing.names[language] for look in scene.looks] for language in languages}


def tags(scene: Scene) -> list[str]:
    """Returns the names and attributes of all things, each once, in a drawn order."""
    words = dict.fromkeys(word for look in scene.looks for word in (look.thing.name, *look.attributes))
    return shuffled(scene.random("tags"), list(words))


def described(look: Look) -> str:
    """Returns attributes and name: "big red fox"."""
    return " ".join((*look.attributes, look.thing.name))
