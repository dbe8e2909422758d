"""Captions that are false of the picture by one word, and questions with wrong answers to choose from.

A wrong thing is not there, is of another subgroup than all that are, shares no word with them and looks like none of
them (words.confused).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from vlm_jax.data.scenes import pictures, words
from vlm_jax.data.scenes.scene import Scene, below, pick, pool
from vlm_jax.data.scenes.texts import (
    NUMBERS,
    RELATION,
    Word,
    caption_words,
    related,
    shuffled,
    singles,
    stated_relations,
    text,
)

KINDS = ("object", "attribute", "relation", "count", "order")
OTHER_RELATION = {
    "left": ("right",), "right": ("left",), "above": ("below",), "below": ("above",), "bigger": ("smaller",),
    "smaller": ("bigger",), "inside": ("above", "below"),
}  # fmt: skip
OTHER_ATTRIBUTE = {"big": ("small",), "small": ("big",), "upside-down": ("tilted",), "tilted": ("upside-down",)}
OTHER_ATTRIBUTE |= {
    colour: tuple(other for other in pictures.COLOURS if other != colour) for colour in pictures.COLOURS
}


def absent(scene: Scene, rng: random.Random, like: str = "") -> words.Thing:
    """Draws a thing that is surely not in the scene.

    Args:
      scene: the scene.
      rng: random numbers.
      like: a name; if given, the thing's name is one word with the same article.
    """
    things, confused = words.things(), words.confused()
    there = [look.thing for look in scene.looks]
    (candidates,) = (c for style, c in pool(scene.split, scene.options.styles) if style == scene.style)
    while True:
        i = pick(rng, candidates)
        thing = things[i]
        if any(confused[i, other.index] for other in there) or any(thing.subgroup == other.subgroup for other in there):
            continue
        if not like or (_is_one_word(thing.name) and words.article(thing.name) == words.article(like)):
            return thing


def _is_one_word(name: str) -> bool:
    return " " not in name


def foils(scene: Scene) -> dict[str, str]:
    """Returns kind -> the caption with one word changed; a kind that the caption does not offer is left out.

    "order" exchanges two names (of a relation), or what two looks have (their colours, sizes, numbers).
    """
    rng, caption = scene.random("foils"), caption_words(scene)
    found = {kind: FOILS[kind](scene, rng, caption) for kind in KINDS}
    return {kind: text(words) for kind, words in found.items() if words}


def _changed(caption: Sequence[Word], rng: random.Random, options: Sequence[tuple[int, str]]) -> list[Word] | None:
    """The caption with one of (place, other word); articles stay right."""
    fits = [
        (at, other)
        for at, other in options
        if caption[at - 1].role != "article" or words.article(other) == words.article(caption[at].text)
    ]
    if not fits:
        return None
    at, other = pick(rng, fits)
    return [*caption[:at], caption[at]._replace(text=other), *caption[at + 1 :]]


def _places(caption: Sequence[Word], *roles: str) -> list[tuple[int, Word]]:
    return [(at, word) for at, word in enumerate(caption) if word.role in roles]


def _object(scene: Scene, rng: random.Random, caption: Sequence[Word]) -> list[Word] | None:
    options = []
    for at, word in _places(caption, "name"):
        if _is_one_word(word.text):
            thing = absent(scene, rng, like=word.text)
            options.append((at, thing.name if scene.counts[word.of] == 1 else thing.plural))
    return _changed(caption, rng, options)


def _attribute(scene: Scene, rng: random.Random, caption: Sequence[Word]) -> list[Word] | None:
    places = _places(caption, "size", "turn", "colour")
    return _changed(caption, rng, [(at, other) for at, word in places for other in OTHER_ATTRIBUTE[word.text]])


def _relation(scene: Scene, rng: random.Random, caption: Sequence[Word]) -> list[Word] | None:
    places = _places(caption, "relation")
    return _changed(caption, rng, [(at, other) for at, word in places for other in OTHER_RELATION[word.text]])


def _count(scene: Scene, rng: random.Random, caption: Sequence[Word]) -> list[Word] | None:
    places = _places(caption, "count")
    return _changed(caption, rng, [(at, other) for at, word in places for other in NUMBERS[2:] if other != word.text])


def _order(scene: Scene, rng: random.Random, caption: Sequence[Word]) -> list[Word] | None:
    roles = ("name",) if _places(caption, "relation") else ("size", "turn", "colour", "count")
    options = []
    for role in roles:
        places = _places(caption, role)
        options += [(a, b) for i, a in enumerate(places) for b in places[:i] if a[1].text != b[1].text]
    if not options:
        return None
    (at, first), (to, second) = pick(rng, options)
    swapped = list(caption)
    swapped[at], swapped[to] = first._replace(text=second.text), second._replace(text=first.text)
    return swapped


FOILS = {"object": _object, "attribute": _attribute, "relation": _relation, "count": _count, "order": _order}


# --- questions ------------------------------------------------------------------------------------------------------

CHOICES = 4


def questions(scene: Scene) -> dict[str, list[Any]]:
    """Returns questions on the scene as columns: kind, question, answer, choices (shuffled, the answer among them)."""
    rng = scene.random("questions")
    rows = [ask(scene, rng) for ask in (_how_many, _what_colour, _is_there, _where, _what_is)]
    rows = [row for row in rows if row]
    return {name: [row[i] for row in rows] for i, name in enumerate(("kind", "question", "answer", "choices"))}


def _row(rng: random.Random, kind: str, question: str, answer: str, wrong: Sequence[str]) -> tuple:
    wrong = shuffled(rng, [choice for choice in dict.fromkeys(wrong) if choice != answer])[: CHOICES - 1]
    return kind, question, answer, shuffled(rng, [answer, *wrong])


def _how_many(scene: Scene, rng: random.Random) -> tuple:
    group = below(rng, len(scene.looks))
    many, answer = scene.looks[group].thing.plural, NUMBERS[scene.counts[group]]
    question = pick(rng, ("How many {} are there?", "How many {} can be seen?")).format(many)
    return _row(rng, "count", question, answer, NUMBERS[1:])


def _what_colour(scene: Scene, rng: random.Random) -> tuple | None:
    coloured = [group for group, look in enumerate(scene.looks) if look.colour]
    if not coloured:
        return None
    group = pick(rng, coloured)
    look, one = scene.looks[group], scene.counts[group] == 1
    name = f"is the {look.thing.name}" if one else f"are the {look.thing.plural}"
    return _row(rng, "colour", f"What colour {name}?", look.colour, tuple(pictures.COLOURS))


def _is_there(scene: Scene, rng: random.Random) -> tuple:
    yes = rng.random() < 0.5
    thing = pick(rng, scene.looks).thing if yes else absent(scene, rng)
    question = pick(rng, ("Is there {}?", "Is there {} in the picture?")).format(
        f"{words.article(thing.name)} {thing.name}"
    )
    return _row(rng, "object", question, "yes" if yes else "no", ("yes", "no"))


def _where(scene: Scene, rng: random.Random) -> tuple | None:
    """Whether a relation holds, asked of two things."""
    stated = stated_relations(scene)
    if not stated:
        return None
    a, middle, b = related(scene, pick(rng, stated), rng, definite=True)
    yes = rng.random() < 0.5
    if not yes:
        other = lambda word: word._replace(text=pick(rng, OTHER_RELATION[word.text]))
        middle = [other(word) if word.role == "relation" else word for word in middle]
    return _row(rng, "relation", f"Is {text([*a, *middle, *b])}?", "yes" if yes else "no", ("yes", "no"))


def _what_is(scene: Scene, rng: random.Random) -> tuple | None:
    """What stands in a relation, if one thing alone does."""
    stated = [relation for relation in stated_relations(scene) if relation[1] != "bigger"]
    only = [r for r in stated if sum(r[1:] == other[1:] for other in scene.relations) == 1]
    if not only:
        return None
    i, name, j = pick(rng, only)
    thing = lambda k: scene.looks[scene.objects[k].group].thing.name
    (word, _), form = RELATION[name]
    wrong = [thing(k) for k in singles(scene) if k not in (i, j)]
    wrong = [*wrong, *(absent(scene, rng).name for _ in range(CHOICES - 1 - min(len(wrong), CHOICES - 1)))]
    return _row(rng, "what", f"What is {form.format(word)} the {thing(j)}?", thing(i), wrong)
