"""Foils: rules turn right captions into wrong captions, the hard negatives of ARO and SugarCrepe.

ARO: arXiv:2210.01936. SugarCrepe: arXiv:2306.14610, where a language model writes the wrong captions.
"""

import re
import zlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

# At most one word of a family is true of a thing: a red thing is not green.
ATTRIBUTES = (
    ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey"),
    ("small", "medium", "large"),
    ("little", "big"),
    ("short", "tall"),
    ("young", "old"),
    ("open", "closed"),
    ("empty", "full"),
    ("hot", "cold"),
    ("wet", "dry"),
    ("raised", "lowered"),
    ("locked", "unlocked"),
    ("manual", "motorized"),
    ("curly", "straight"),
    ("fried", "roasted"),
    ("smiling", "frowning"),
    ("waxing", "waning"),
    ("increasing", "decreasing"),
    ("high", "low"),
    ("up", "down"),
    ("left", "right"),
    ("first", "last"),
    ("clockwise", "counterclockwise"),
)
FAMILY = {word: family for family in ATTRIBUTES for word in family}
FUNCTION_WORDS = frozenset(
    ("a", "an", "the", "and", "or", "but", "not", "no", "as", "is", "are", "with", "without", "of", "in", "into", "on",
     "onto", "at", "to", "from", "for", "by", "behind", "over", "under", "above", "below", "near", "through", "between",
     "around")
)  # fmt: skip
NOUNS = frozenset(("building", "ceiling", "clothing", "evening", "morning", "pudding", "wedding"))  # no verbs in -ing
ANYONE = frozenset(("person", "people"))  # true of every man and woman

_WORD = re.compile(r"[^\W_][\w'’]*")
_HYPHENATED = re.compile(rf"{_WORD.pattern}(?:-[\w'’]+)*")


class Corpus(NamedTuple):
    """The texts that foils are made from.

    Attributes:
      words: all words of the captions, lower-case.
      captions: the captions, sorted, each once.
      nouns: (group, bare) -> the subjects of the group's captions, sorted, each once; bare: without leading attributes.
    """

    words: frozenset[str]
    captions: list[str]
    nouns: dict[tuple[Hashable, bool], list[str]]


def corpus(captions: Sequence[str], groups: Sequence[Hashable]) -> Corpus:
    """Returns the corpus of N captions; captions of one group of `groups` [N] name things of one kind."""
    nouns: dict[tuple[Hashable, bool], set[str]] = {}
    for text, group in zip(captions, groups, strict=True):
        start, end = _noun(text)
        if ANYONE.isdisjoint(_words(text[start:end])):
            nouns.setdefault((group, False), set()).add(text[:end])
            nouns.setdefault((group, True), set()).add(text[start:end])
    words = frozenset(word for text in captions for word in _words(text))
    return Corpus(words, sorted(set(captions)), {key: sorted(own) for key, own in nouns.items()})


def foil(kind: str, caption: str, group: Hashable, true: Sequence[str], others: Corpus) -> str | None:
    """Returns a caption that is wrong in one respect, or None if the rules give none.

    Among several candidates a checksum of the caption chooses, so the result is deterministic. A candidate may be true,
    and is left out, if it is in `true`, or (for objects and attributes) if all its words are in the caption and `true`.

    Args:
      kind: "object": the caption's subject (its words before a preposition or a verb in -ing) is replaced with the
        subject of another caption of the group, with no word in common; leading attributes stay ("black cat", "black
        fox"). If the group has no such subject, another caption replaces the whole caption. Captions about a person or
        people have no foil: a man is a person. "attribute": the caption's first word of `ATTRIBUTES` is replaced with
        another word of the same family that the captions use. "order": the first and the last content word change
        places; captions with an "and" or "or" have no foil, since their order may not matter.
      caption: the right caption.
      group: the caption's group.
      true: other texts that are true of the same picture.
      others: the `corpus` of all captions.
    """
    known = {word for text in (caption, *true) for word in _words(text)}
    texts = {tuple(_words(text)) for text in (caption, *true)}
    for text in KINDS[kind](caption, group, others):
        words = _words(text)
        if tuple(words) not in texts and (kind == "order" or not known.issuperset(words)):
            return text
    return None


def _objects(caption: str, group: Hashable, others: Corpus) -> Iterator[str]:
    start, end = _noun(caption)
    if ANYONE.isdisjoint(_words(caption[start:end])):
        bare = start > 0
        start, own = start if bare else 0, set(_words(caption))
        apart = lambda text: own.isdisjoint(word for word in _words(text) if word not in FUNCTION_WORDS)
        same_group = _from_one_on(others.nouns[group, bare], caption)
        yield from (caption[:start] + noun + caption[end:] for noun in same_group if apart(noun))
        yield from filter(apart, _from_one_on(others.captions, caption))


def _attributes(caption: str, group: Hashable, others: Corpus) -> Iterator[str]:
    del group
    for match in _WORD.finditer(caption):
        word = match[0].lower()
        family = [other for other in FAMILY.get(word, ()) if other != word and other in others.words]
        for other in _from_one_on(family, caption):
            spelled = other.upper() if match[0].isupper() else other.title() if match[0].istitle() else other
            yield caption[: match.start()] + spelled + caption[match.end() :]


def _orders(caption: str, group: Hashable, others: Corpus) -> Iterator[str]:
    del group, others
    content = [match for match in _HYPHENATED.finditer(caption) if match[0].lower() not in FUNCTION_WORDS]
    if len(content) > 1 and {"and", "or"}.isdisjoint(_words(caption)):
        first, last = content[0], content[-1]
        between = caption[first.end() : last.start()]
        yield caption[: first.start()] + last[0] + between + first[0] + caption[last.end() :]


KINDS: dict[str, Callable[[str, Hashable, Corpus], Iterator[str]]] = {
    "object": _objects,
    "attribute": _attributes,
    "order": _orders,
}


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _noun(caption: str) -> tuple[int, int]:
    """The start and the end of the caption's subject; of the whole caption if no subject is found."""
    words, end = [], 0
    for match in _HYPHENATED.finditer(caption):
        word = match[0].lower()
        verb = len(word) > 5 and word.endswith("ing") and word not in NOUNS
        if words and (word in FUNCTION_WORDS or verb or caption[end : match.start()].strip()):
            break
        end = match.end()
        if words or not (word in FUNCTION_WORDS or word in FAMILY):
            words.append(match)
    return (words[0].start(), words[-1].end()) if words else (0, len(caption))


def _from_one_on(texts: list[str], seed: str) -> Iterator[str]:
    """All texts, starting at a text that a checksum chooses, and wrapping around."""
    start = zlib.crc32(seed.encode()) % max(len(texts), 1)
    yield from (texts[(start + i) % len(texts)] for i in range(len(texts)))
