"""Texts that are wrong by a word, made of true ones by rules: hard negatives.

    object      another thing of the same list: "a dog" -> "a cat"
    attribute   another colour, size, ...: "a red fox" -> "a blue fox"
    relation    its opposite: "left of" -> "right of"
    count       another number: "two owls" -> "five owls"
    order       two phrases around a relation change places; or two attributes, or two numbers, of two phrases do

A word is replaced only if the article before it stays right. Where facts are known, every text is false by them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from vlm_jax.data import phrases
from vlm_jax.data.english import CONVERSE, Match, Words, article, plural
from vlm_jax.data.phrases import Phrase, Reading

Kind = Literal["object", "attribute", "relation", "count", "order"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Edit(NamedTuple):
    """Other words for the characters from start to end."""

    start: int
    end: int
    other: str


class Claim(NamedTuple):
    """What a changed text says: (kind, heads, word); heads are names as the text has them."""

    kind: str
    heads: tuple[str, ...]
    word: str


Change = tuple[tuple[Edit, ...], tuple[Claim, ...]]


class Facts:
    """What is known of a picture.

    Args:
      objects: columns `name` and, for attributes, `attributes` (a list of each object).
      relations: columns `subject`, `relation`, `object`; subject and object are places in `objects`. None: not known.
    """

    def __init__(self, objects: Mapping[str, Sequence], relations: Mapping[str, Sequence] | None = None):
        self.names = [str(name).lower() for name in objects["name"]]
        self._called: dict[str, list[int]] = {}
        for i, name in enumerate(self.names):
            for one in {name, plural(name)}:
                self._called.setdefault(one, []).append(i)
        self._parts = {part for name in self._called for part in name.split()}
        self.attributes = None
        if "attributes" in objects:
            self.attributes = [{one.lower() for one in some} for some in objects["attributes"]]
        self.relations = None
        if relations is not None:
            columns = (relations[key] for key in ("subject", "relation", "object"))
            self.relations = {(int(i), str(name).lower(), int(j)) for i, name, j in zip(*columns, strict=True)}

    def called(self, head: str) -> list[int]:
        """Returns the objects of a name, singular or plural."""
        return self._called.get(head.lower(), [])

    def deny(self, claim: Claim, words: Words) -> bool:
        """Returns whether a claim is surely false of the picture; of names that are not there nothing is sure."""
        if claim.kind == "object":
            return self._parts.isdisjoint(claim.word.lower().split())
        called = [self.called(head) for head in claim.heads]
        if not all(called):
            return False
        if claim.kind == "attribute":
            said = _wordings(words, "attribute", claim.word)
            return self.attributes is not None and not any(said & self.attributes[i] for i in called[0])
        if claim.kind == "count":
            place = words.place("count", claim.word)
            return place is not None and place[1] + 2 != len(called[0])  # the packaged lists begin with two
        if self.relations is None or any(len(some) > 1 for some in called):
            return False
        (i,), (j,) = called
        said, back = _wordings(words, "relation", claim.word), _converse(words, claim.word)
        stated = {(i, word.split()[0], j) for word in said} | {(j, word.split()[0], i) for word in back}
        return self.relations.isdisjoint(stated)


def _wordings(words: Words, kind: str, word: str) -> set[str]:
    """All wordings of a word, in small letters."""
    place = words.place(kind, word)
    return {one.lower() for one in words.lists[kind][place[0]][place[1]]} if place else {word.lower()}


def _converse(words: Words, word: str) -> set[str]:
    """All wordings of the relation that holds the other way round."""
    place = words.place("relation", word)
    if place is None or words.lists["relation"][place[0]][0][0] not in CONVERSE:
        return set()
    return {one.lower() for one in words.lists["relation"][place[0]][1 - place[1]]}


# --- changes of each kind --------------------------------------------------------------------------------------------


def _replaced(kind: str) -> Callable[[str, Reading, Words], list[Change]]:
    def changes(text: str, reading: Reading, words: Words) -> list[Change]:
        found = []
        for match in reading.matches:
            if match.kind != kind:
                continue
            if kind == "object" and not _is_name(match, reading):
                continue
            heads = _heads(kind, match, reading)
            before = article_at(text, match.start)
            for other in words.others(match):
                if before in (None, article(other)):
                    found.append(((Edit(match.start, match.end, other),), (Claim(kind, heads, other),)))
        return found

    return changes


def _is_name(match: Match, reading: Reading) -> bool:
    """Whether a thing is a phrase's whole name, or in no phrase: not the dog of a dog house."""
    around = [phrase.place for phrase in reading.phrases if phrase.place[0] <= match.start < phrase.place[1]]
    return not around or around[0] == (match.start, match.end)


def _heads(kind: str, match: Match, reading: Reading) -> tuple[str, ...]:
    """The names that a word speaks of; ("",) if there is none."""
    if kind == "relation":
        for a, link, b in zip(reading.phrases, reading.links, reading.phrases[1:], strict=False):
            if link and link.word == match:
                return a.head, b.head
    for phrase in reading.phrases:
        if match in phrase.attributes or match == phrase.count:
            return (phrase.head,)
    return ("",)


def _order(text: str, reading: Reading, words: Words) -> list[Change]:
    found = []
    for a, link, b in zip(reading.phrases, reading.links, reading.phrases[1:], strict=False):
        if link and phrases.directed(link, words) and a.head.lower() != b.head.lower() and a.many == b.many:
            first, second = text[a.start : a.end], text[b.start : b.end]
            name = text[link.start : link.end]
            edits = Edit(a.start, a.end, second), Edit(b.start, b.end, first)
            found.append((edits, (Claim("relation", (b.head, a.head), name),)))
    for i, a in enumerate(reading.phrases):
        for b in reading.phrases[:i]:
            found += _exchanged(text, b, a, words)
    return found


def _exchanged(text: str, a: Phrase, b: Phrase, words: Words) -> Iterator[Change]:
    """Exchanges an attribute, or the numbers, of two phrases with different names."""
    pairs = [("attribute", p, q) for p in a.attributes for q in b.attributes]
    pairs += [("count", a.count, b.count)] if a.count and b.count else []
    for kind, p, q in pairs:
        same_list = p.place[0] == q.place[0] and p.place[1] != q.place[1]
        if not same_list or a.head.lower() == b.head.lower() or _has(a, q) or _has(b, p):
            continue
        first, second = text[p.start : p.end], text[q.start : q.end]
        if article_at(text, p.start) in (None, article(second)) and article_at(text, q.start) in (None, article(first)):
            claims = Claim(kind, (a.head,), second), Claim(kind, (b.head,), first)
            yield (Edit(p.start, p.end, second), Edit(q.start, q.end, first)), claims


def _has(phrase: Phrase, match: Match) -> bool:
    return any(own.place[:2] == match.place[:2] for own in phrase.attributes)


def article_at(text: str, start: int) -> str | None:
    """The "a" or "an" before a place, which has to stay right."""
    before = text[max(start - 4, 0) : start].lower().split()[-1:]
    return before[0] if before and before[0] in ("a", "an") else None


CHANGES = {kind: _replaced(kind) for kind in KINDS[:-1]} | {"order": _order}


def edited(text: str, edits: Sequence[Edit]) -> str:
    """Returns the text with edits, which do not overlap; a capital letter stays at its place."""
    out, at = "", 0
    for edit in sorted(edits):
        old, other = text[edit.start : edit.end], edit.other
        if edit.start == 0 and old[:1].isupper():
            other = other[:1].upper() + other[1:]
        elif text.startswith(other):  # a phrase from the beginning
            other = other[:1].lower() + other[1:]
        out += text[at : edit.start] + other
        at = edit.end
    return out + text[at:]


def draw(
    text: str, kinds: Sequence[str], n: int, words: Words, rng: np.random.Generator, facts: Facts | None = None
) -> list[str]:
    """Returns up to n different false texts, of as many kinds as there are; the kinds come in a drawn order."""
    reading = phrases.read(text, words)
    left = [CHANGES[kinds[i]](text, reading, words) for i in rng.permutation(len(kinds))]
    found: list[str] = []
    while len(found) < n and any(left):
        for changes in left:
            while changes and len(found) < n:
                edits, claims = changes.pop(int(rng.random() * len(changes)))
                if facts is not None and not all(facts.deny(claim, words) for claim in claims):
                    continue
                false = edited(text, edits)
                if false.lower() != text.lower() and false not in found:
                    found.append(false)
                    break
    return found
