"""Wrong captions made from right ones, by rules: the hard negatives of ARO (arXiv:2210.01936) and SugarCrepe
(arXiv:2306.14610), without a language model to write them."""

import re
import zlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

# Words of which one at most is true of a thing: a picture of a red one shows no green one.
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
    """What foils are made from.

    Attributes:
      words: all words of the captions, lower-case.
      captions: the captions, sorted, each once.
      nouns: (group, bare) -> what its captions are about, sorted, each once; bare: without leading attributes.
    """

    words: frozenset[str]
    captions: list[str]
    nouns: dict[tuple[Hashable, bool], list[str]]


def corpus(captions: Sequence[str], groups: Sequence[Hashable]) -> Corpus:
    """What the foils of captions are made from; `groups` [N] says which captions name things of a kind."""
    nouns: dict[tuple[Hashable, bool], set[str]] = {}
    for text, group in zip(captions, groups, strict=True):
        start, end = _noun(text)
        if ANYONE.isdisjoint(_words(text[start:end])):
            nouns.setdefault((group, False), set()).add(text[:end])
            nouns.setdefault((group, True), set()).add(text[start:end])
    words = frozenset(word for text in captions for word in _words(text))
    return Corpus(words, sorted(set(captions)), {key: sorted(own) for key, own in nouns.items()})


def foil(kind: str, caption: str, group: Hashable, true: Sequence[str], others: Corpus) -> str | None:
    """A caption that is wrong in one respect, or None where the rules give none. The same for the same arguments.

    Among several that fit, a checksum of the caption chooses. What is left out as possibly true: a text that `true` has
    and, of objects and attributes, one that has no word which the caption and `true` lack.

    Args:
      kind: "object": what the caption is about (its words before a preposition or a verb in -ing) becomes what another
        caption of the group is about, with no word in common, and leading attributes stay ("black cat", "black fox");
        where the group has none, the whole caption becomes another one. Captions about a person or people have none:
        a man is a person. "attribute": its first word of `ATTRIBUTES` becomes another of the same family that the
        captions use. "order": its first and its last content word change places; captions with an "and" or "or" have
        none, since their order may not matter.
      caption: the right caption.
      group: its group.
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
    """Where the words stand that say what the caption is about; all of it where there are none."""
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
    """All texts, from one on that a checksum chooses, and around."""
    start = zlib.crc32(seed.encode()) % max(len(texts), 1)
    yield from (texts[(start + i) % len(texts)] for i in range(len(texts)))
