"""Noun phrases of English texts, by a small grammar, and the triples that a text states.

    phrases.read("a big red fox to the left of two owls that are tilted", english.words())

gives two phrases, with heads "fox" and "owls", and the relation "left of" between them. Determiners, numbers and
attributes of the lists begin a phrase; a relation, a verb in "-ing", a mark or a small word ends it. What is between is
its head. No parser is asked, so that odd sentences give few phrases, or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vlm_jax.data.english import SYMMETRIC, TOKEN, Match, Words

_LISTS = {
    "determiners": "a an the this that these those some any no his her its their my your our another each",
    "many": "these those some several many few",
    "ends": """
        and or but with without of in on at by to for from into onto near next as than while there is are was were be
        been being can could see seen sees show shows shown has have had holds hold sits sit stands stand it they he she
        who which picture image photo photograph drawing very not also
    """,
}
DETERMINERS, MANY, ENDS = (frozenset(_LISTS[name].split()) for name in ("determiners", "many", "ends"))


class Phrase(NamedTuple):
    """A noun phrase.

    Attributes:
      start, end: characters; attributes that follow ("that is tilted") are inside.
      head: the name, as written.
      place: (start, end) of the head.
      many: whether it is a plural by its number or determiner; None: not known.
      count: the number, or None.
      attributes: words of the lists.
    """

    start: int
    end: int
    head: str
    place: tuple[int, int]
    many: bool | None = None
    count: Match | None = None
    attributes: tuple[Match, ...] = ()


class Relation(NamedTuple):
    """What stands between a phrase and the next: characters start to end, and the lists' word; a verb has none."""

    start: int
    end: int
    word: Match | None


class Reading(NamedTuple):
    """Phrases in order; links[i] is the relation between phrases i and i + 1, or None; and all words of the lists."""

    phrases: tuple[Phrase, ...]
    links: tuple[Relation | None, ...]
    matches: tuple[Match, ...]


def read(text: str, words: Words) -> Reading:
    """Returns the phrases of a text."""
    matches = words.find(text)
    phrases: list[Phrase] = []
    links: list[Relation | None] = []
    draft, link, follows = _Draft(), None, False

    def close():
        nonlocal link
        if phrase := draft.phrase(text):
            phrases.append(phrase)
            links.append(link)
            link = None

    for start, end, match in _units(text, matches):
        word, kind = text[start:end].lower(), match.kind if match else ""
        verb = not match and len(word) > 4 and word.endswith("ing")
        determines = word in DETERMINERS or word in MANY or kind == "count" or word == "one"
        if kind == "attribute" and follows and phrases and draft.start < 0 and link is None:  # "owls that are tilted"
            last = phrases[-1]
            phrases[-1] = last._replace(end=end, attributes=(*last.attributes, match))
        elif kind == "relation" or verb:
            close()
            link, follows, draft = link or Relation(start, end, match), False, _Draft()
        elif determines or word in ENDS or kind == "other" or not word[0].isalnum():
            close()
            follows = word in ("is", "are")
            if not word[0].isalnum():
                link = None
            draft = _Draft(start, word, match) if determines and word != "that" else _Draft()
        else:
            draft.add(start, end, match if kind == "attribute" else None)
    close()
    return Reading(tuple(phrases), tuple(links[1:]), tuple(matches))


def _units(text: str, matches: Sequence[Match]):
    """(start, end, match or None) of words and marks; the words of a match are one."""
    at, following = 0, iter([*matches, None])
    match = next(following)
    for token in TOKEN.finditer(text):
        if token.start() < at:
            continue
        while match and match.end <= token.start():
            match = next(following)
        if match and match.start == token.start():
            at = match.end
            yield match.start, match.end, match
        else:
            at = token.end()
            yield token.start(), token.end(), None


class _Draft:
    """A phrase that has begun, if `start` is not below 0."""

    def __init__(self, start: int = -1, first: str = "", count: Match | None = None):
        self.start, self.first, self.count = start, first, count
        self.attributes: list[Match] = []
        self.head: tuple[int, int] | None = None

    def add(self, start: int, end: int, attribute: Match | None) -> None:
        self.start = start if self.start < 0 else self.start
        if attribute and self.head is None:
            self.attributes.append(attribute)
        else:
            self.head = (self.head[0] if self.head else start, end)

    def phrase(self, text: str) -> Phrase | None:
        """The phrase; None without a head."""
        head, attributes, single = self.head, self.attributes, self.first in ("a", "an", "one", "another", "each")
        if head is None and attributes and single:  # "an orange"
            *attributes, last = attributes
            head = last.start, last.end
        if head is None:
            return None
        many = True if self.count or self.first in MANY else False if single else None
        return Phrase(self.start, head[1], text[slice(*head)], head, many, self.count, tuple(attributes))


def triples(text: str, words: Words) -> list[tuple[str, str, str]]:
    """Returns (head, relation, head) of neighbouring phrases, then (head, "is", attribute), as the text has them.

    Heads and attributes in small letters; relations of the lists by their usual wording.
    """
    reading = read(text, words)
    stated = []
    for a, link, b in zip(reading.phrases, reading.links, reading.phrases[1:], strict=False):
        if link:
            name = words.usual(link.word) if link.word else text[link.start : link.end].lower()
            stated.append((a.head.lower(), name, b.head.lower()))
    for phrase in reading.phrases:
        stated += [(phrase.head.lower(), "is", words.usual(match)) for match in phrase.attributes]
    return stated


def directed(link: Relation, words: Words) -> bool:
    """Returns whether a relation of two different things cannot hold both ways: not "near"."""
    return link.word is None or words.usual(link.word) not in SYMMETRIC
