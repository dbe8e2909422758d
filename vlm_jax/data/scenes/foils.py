"""Captions that are false of the picture by one word, and questions with wrong answers to choose from.

A wrong thing is not there, is of another subgroup than all that are, shares no word with them and looks like none of
them (words.confused). What only `unseen_pairs` shows is not named elsewhere either, so that no training makes it false.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
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

ATTRIBUTES = ("size", "turn", "colour")
TRIES = 100
KINDS = ("object", "attribute", "relation", "count", "order")
OTHER_RELATION = {
    "left": ("right",), "right": ("left",), "above": ("below",), "below": ("above",), "bigger": ("smaller",),
    "smaller": ("bigger",), "inside": ("above", "below"),
}  # fmt: skip
OTHER_ATTRIBUTE = {"big": ("small",), "small": ("big",), "upside-down": ("tilted",), "tilted": ("upside-down",)}
OTHER_ATTRIBUTE |= {
    colour: tuple(other for other in pictures.COLOURS if other != colour) for colour in pictures.COLOURS
}


def absent(
    scene: Scene, rng: random.Random, suits: Callable[[words.Thing], bool] = lambda thing: True
) -> words.Thing | None:
    """Draws a thing that is surely not in the scene, and that suits; None if that is hard to find."""
    things, confused = words.things(), words.confused()
    there = [look.thing for look in scene.looks]
    (candidates,) = (c for style, c in pool(scene.split, scene.options.styles) if style == scene.style)
    for _ in range(TRIES):
        i = pick(rng, candidates)
        thing = things[i]
        if any(confused[i, other.index] or thing.subgroup == other.subgroup for other in there):
            continue
        if scene.split != "unseen_pairs" and any(words.pair_held_out(thing.hexcode, o.hexcode) for o in there):
            continue
        if suits(thing):
            return thing
    return None


def allowed(scene: Scene, attribute: str, thing: words.Thing) -> bool:
    """Returns whether the scene's split may show an attribute of a thing."""
    return scene.split == "unseen_pairs" or not words.cell_held_out(attribute, thing.hexcode)


def foils(scene: Scene) -> dict[str, str]:
    """Returns kind -> the caption with one word changed; a kind that the caption does not offer is left out.

    "order" exchanges two names (of a relation), or what two looks have (their colours, sizes, numbers).
    """
    rng, caption = scene.random("foils"), caption_words(scene)
    found = {kind: FOILS[kind](scene, rng, caption) for kind in KINDS}
    return {kind: text(words) for kind, words in found.items() if words}


def _changed(caption: Sequence[Word], at: int, other: str) -> list[Word]:
    return [*caption[:at], caption[at]._replace(text=other), *caption[at + 1 :]]


def _one_of(caption: Sequence[Word], rng: random.Random, options: Sequence[tuple[int, str]]) -> list[Word] | None:
    """The caption with one of (place, other word) before which the article stays right."""
    fits = [
        (at, other)
        for at, other in options
        if caption[at - 1].role != "article" or words.article(other) == words.article(caption[at].text)
    ]
    return _changed(caption, *pick(rng, fits)) if fits else None


def _places(caption: Sequence[Word], *roles: str) -> list[tuple[int, Word]]:
    return [(at, word) for at, word in enumerate(caption) if word.role in roles]


def _object(scene: Scene, rng: random.Random, caption: Sequence[Word]) -> list[Word] | None:
    one_word = lambda thing: " " not in thing.name
    places = [(at, word) for at, word in _places(caption, "name") if " " not in word.text]
    if not places:
        return None
    at, word = pick(rng, places)
    if scene.counts[word.of] > 1:
        thing = absent(scene, rng, one_word)
        return thing and _changed(caption, at, thing.plural)
    same = lambda thing: one_word(thing) and words.article(thing.name) == words.article(word.text)
    thing = absent(scene, rng, same)
    return thing and _changed(caption, at, thing.name)


def _attribute(scene: Scene, rng: random.Random, caption: Sequence[Word]) -> list[Word] | None:
    options = []
    for at, word in _places(caption, *ATTRIBUTES):
        thing = scene.looks[word.of].thing
        options += [(at, other) for other in OTHER_ATTRIBUTE[word.text] if allowed(scene, other, thing)]
    return _one_of(caption, rng, options)


def _relation(scene: Scene, rng: random.Random, caption: Sequence[Word]) -> list[Word] | None:
    places = _places(caption, "relation")
    return _one_of(caption, rng, [(at, other) for at, word in places for other in OTHER_RELATION[word.text]])


def _count(scene: Scene, rng: random.Random, caption: Sequence[Word]) -> list[Word] | None:
    places = _places(caption, "count")
    return _one_of(caption, rng, [(at, other) for at, word in places for other in NUMBERS[2:] if other != word.text])


def _order(scene: Scene, rng: random.Random, caption: Sequence[Word]) -> list[Word] | None:
    options = []
    for role in ("name",) if _places(caption, "relation") else (*ATTRIBUTES, "count"):
        places = _places(caption, role)
        options += [(a, b) for i, a in enumerate(places) for b in places[:i] if a[1].text != b[1].text]
    options = [(a, b) for a, b in options if _may_swap(scene, a[1], b[1]) and _may_swap(scene, b[1], a[1])]
    if not options:
        return None
    (at, first), (to, second) = pick(rng, options)
    swapped = list(caption)
    swapped[at], swapped[to] = first._replace(text=second.text), second._replace(text=first.text)
    return swapped


def _may_swap(scene: Scene, word: Word, by: Word) -> bool:
    """Whether the split allows what a caption says of `word`'s look, once `by` stands in its place."""
    look, other = scene.looks[word.of], scene.looks[by.of]
    if word.role == "name":
        return all(allowed(scene, attribute, other.thing) for attribute in look.attributes)
    return word.role == "count" or allowed(scene, by.text, look.thing)


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


def _is_there(scene: Scene, rng: random.Random) -> tuple | None:
    yes = rng.random() < 0.5
    thing = pick(rng, scene.looks).thing if yes else absent(scene, rng)
    if thing is None:
        return None
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
    while len({*wrong}) < CHOICES - 1 and (other := absent(scene, rng, lambda thing: thing.name not in wrong)):
        wrong.append(other.name)
    return _row(rng, "what", f"What is {form.format(word)} the {thing(j)}?", thing(i), wrong)
