"""English by rules: articles, plurals, and lists of words that exclude each other, or that mean the same.

    words = english.words()                            the packaged lists
    [match.kind for match in words.find("two red cars left of a dog")]     count, attribute, object, relation, object

A list is a text: entries that exclude each other are joined by "; ", wordings of one entry by "|", the usual one first.
A single entry has wordings alone: they are exchanged in paraphrases, and never make a text false. Lists of numbers
begin with two.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from vlm_jax.errors import DataError, UserError

KINDS = ("object", "attribute", "relation", "count", "other")
LISTS: dict[str, tuple[str, ...]] = {
    "object": (
        "man|guy; woman|lady; boy; girl; baby|infant",
        "dog; cat; horse; cow; sheep; pig; goat; elephant; bear; zebra; giraffe; monkey; rabbit|bunny; lion; tiger; "
        "fox; deer; mouse; frog; duck; owl; penguin; eagle; swan; turtle; snake; fish; whale; crab; bee; butterfly; "
        "ant; snail",
        "car|automobile; bus; train; truck|lorry; bicycle|bike; motorcycle|motorbike; airplane|plane|aeroplane; "
        "boat; helicopter; tractor; skateboard; surfboard; snowboard; scooter; rocket",
        "apple; banana; lemon; strawberry; pear; pineapple; watermelon; tomato; carrot; onion; potato; mushroom; "
        "pizza; sandwich; hot dog|hotdog; donut|doughnut; cake; cookie|biscuit; hamburger|burger; taco; burrito; egg",
        "chair; couch|sofa; bed; table; desk; bench; toilet; sink; oven; refrigerator|fridge; toaster; lamp; mirror",
        "television|tv; laptop; keyboard; camera; telephone|phone; clock; radio; microphone; printer",
        "cup; bottle; bowl; plate; fork; knife; spoon; vase; jar; key; hammer; candle; umbrella; balloon; kite; bell; "
        "book; newspaper; pencil; paperclip; drum; guitar; violin; trumpet",
        "hat; tie|necktie; shirt; dress; coat; shoe; sock; glove; scarf; crown; backpack|rucksack; handbag; suitcase",
        "house; church; castle; tent; bridge; tower; hospital; school",
        "tree; flower; cactus; mountain; beach; river",
    ),
    "attribute": (
        "red; orange; yellow; green; blue; purple|violet; pink; brown; black; white; grey|gray",
        "big|large; small|little",
        "tall; short",
        "young; old",
        "open; closed",
        "full; empty",
        "wet; dry",
        "clean; dirty",
        "upside-down|upside down; tilted",
        "wooden; metal|metallic; plastic",
        "striped; spotted|dotted; checkered|checked",
        "round|circular; square; triangular",
        "sunny; rainy; snowy",
        "smiling; crying",
    ),
    "relation": (
        "left of|to the left of|on the left of; right of|to the right of|on the right of",
        "above; below",
        "over; under",
        "on top of; beneath|underneath",
        "in front of; behind",
        "bigger than|larger than; smaller than",
        "taller than; shorter than",
        "inside|inside of; outside|outside of",
        "near|close to; far from|far away from",
    ),
    "count": ("two; three; four; five; six; seven; eight; nine; ten", "2; 3; 4; 5; 6; 7; 8; 9; 10"),
    "other": ("picture|image", "photo|photograph"),
}
CONVERSE = ("left of", "above", "over", "on top of", "in front of", "bigger than", "taller than")
"""Relations whose list has two entries, of which each holds the other way round."""
SYMMETRIC = ("near", "far from", "outside")
TOKEN = re.compile(r"[\w’'-]+|[^\w\s]")  # a word or a mark
TRIED = 1_000  # texts, of which one at least should have a word of the lists
UNCHANGED = {"sheep", "fish", "deer", "moose", "bison", "shrimp", "squid", "goldfish", "blowfish", "starfish"}
IRREGULAR = {
    "mouse": "mice", "goose": "geese", "ox": "oxen", "wolf": "wolves", "leaf": "leaves", "knife": "knives",
    "loaf": "loaves", "scarf": "scarves", "tooth": "teeth", "foot": "feet", "octopus": "octopuses", "T-Rex": "T-Rexes",
    "volcano": "volcanoes", "potato": "potatoes", "tomato": "tomatoes", "mango": "mangoes", "mosquito": "mosquitoes",
    "bus": "buses", "trolleybus": "trolleybuses", "minibus": "minibuses", "dress": "dresses", "jellyfish": "jellyfish",
    "fly": "flies", "die": "dice", "sheaf": "sheaves", "snowman": "snowmen", "tornado": "tornadoes",
    "man": "men", "woman": "women", "child": "children", "person": "people",
}  # fmt: skip
VOWEL_BUT_A = ("uni", "ewe", "euro", "one", "eucalyptus", "ukulele", "utensil")
AN = ("hourglass", "x-ray", "heir")


def article(word: str) -> str:
    """Returns "a" or "an", for the word that follows."""
    if word.startswith(AN):
        return "an"
    return "an" if word[0].lower() in "aeiou" and not word.lower().startswith(VOWEL_BUT_A) else "a"


def plural(name: str) -> str:
    """Returns the plural of an English name: its head noun's, before `of`."""
    head, of, rest = name.partition(" of ")
    before, space, noun = head.rpartition(" ")
    if noun in UNCHANGED:
        many = noun
    elif noun in IRREGULAR:
        many = IRREGULAR[noun]
    elif re.search("(s|x|z|ch|sh)$", noun):
        many = f"{noun}es"
    elif re.search("[^aeiou]y$", noun):
        many = f"{noun[:-1]}ies"
    else:
        many = f"{noun}s"
    return f"{before}{space}{many}{of}{rest}"


class Match(NamedTuple):
    """A word of the lists in a text.

    Attributes:
      start, end: characters.
      kind: of `KINDS`.
      place: (list, entry, wording).
      many: whether it is a plural.
    """

    start: int
    end: int
    kind: str
    place: tuple[int, int, int]
    many: bool = False


class Words:
    """Lists of words by kind, searched at once.

    Attributes:
      lists: kind -> list -> entry -> wordings.
    """

    def __init__(self, lists: Mapping[str, tuple[str, ...]]):
        """Raises UserError: a kind is unknown, or two entries have one wording."""
        self.lists = {kind: tuple(_entries(kind, one) for one in some) for kind, some in lists.items()}
        self._known: dict[str, tuple[str, tuple[int, int, int], bool]] = {}
        for kind, some in self.lists.items():
            if kind not in KINDS:
                raise UserError(f"there are no words of the kind `{kind}`; expected some of: {', '.join(KINDS)}")
            for i, one in enumerate(some):
                for j, wordings in enumerate(one):
                    for k, word in enumerate(wordings):
                        self._add(word, kind, (i, j, k), False)
                        if kind == "object":
                            self._add(plural(word), kind, (i, j, k), True)
        self._longest = max((len(TOKEN.findall(word)) for word in self._known), default=0)

    @property
    def shown(self) -> list[str]:
        """The first word of each kind."""
        return [some[0][0][0] for some in self.lists.values() if some]

    def _add(self, word: str, kind: str, place: tuple[int, int, int], many: bool) -> None:
        if not word:
            raise UserError(f"a list of words of the kind `{kind}` has an empty entry")
        if self._known.setdefault(word.lower(), (kind, place, many))[:2] != (kind, place):
            raise UserError(f"the lists of words have `{word}` twice; an entry has one meaning")

    def find(self, text: str) -> list[Match]:
        """Returns the words of the lists in a text, in order; of words that overlap the longest."""
        found = longest(text, self._known, self._longest)
        return [Match(start, end, *place) for start, end, place in found]

    def place(self, kind: str, word: str) -> tuple[int, int] | None:
        """Returns (list, entry) of a word of a kind, or None."""
        known = self._known.get(word.lower())
        return known[1][:2] if known and known[0] == kind else None

    def wordings(self, match: Match) -> tuple[str, ...]:
        """Returns the wordings of a match's entry, in its number."""
        i, j, _ = match.place
        return tuple(map(plural, self.lists[match.kind][i][j])) if match.many else self.lists[match.kind][i][j]

    def others(self, match: Match) -> list[str]:
        """Returns a word of each entry that excludes the match's, in its number; of relations the like wording."""
        i, j, k = match.place
        k = k if match.kind == "relation" else 0
        found = [one[min(k, len(one) - 1)] for n, one in enumerate(self.lists[match.kind][i]) if n != j]
        return list(map(plural, found)) if match.many else found

    def usual(self, match: Match) -> str:
        """Returns the first wording of a match's entry, singular."""
        i, j, _ = match.place
        return self.lists[match.kind][i][j][0]


def longest(text: str, known: Mapping[str, Any], most: int, key: Callable[[str], str] = str.lower) -> list[tuple]:
    """Returns (start, end, value) of the words of a mapping in a text; of words that overlap the longest.

    Args:
      text: any.
      known: word, as `key` gives it, -> value.
      most: tokens of the longest word.
      key: of a part of the text.
    """
    spans, found, i = [token.span() for token in TOKEN.finditer(text)], [], 0
    while i < len(spans):
        for j in range(min(i + most, len(spans)), i, -1):
            start, end = spans[i][0], spans[j - 1][1]
            if (value := known.get(key(text[start:end]))) is not None:
                found.append((start, end, value))
                i = j - 1
                break
        i += 1
    return found


def _entries(kind: str, one: str) -> tuple[tuple[str, ...], ...]:
    if not isinstance(one, str):
        raise UserError(f"words of the kind `{kind}` are {one!r:.60}; expected texts such as 'red; green; blue'")
    return tuple(tuple(word.strip() for word in entry.split("|")) for entry in one.split(";"))


@functools.lru_cache(64)
def _of(items: tuple[tuple[str, tuple[str, ...]], ...]) -> Words:
    return Words(dict(items))


_PACKAGED = tuple(LISTS.items())


def words(lists: Mapping[str, tuple[str, ...]] | None = None) -> Words:
    """Returns the words of lists by kind, of which a text is one list; None: the packaged ones.

    Kinds that `lists` lack have no words.
    """
    if lists is None:
        return _of(_PACKAGED)
    return _of(tuple((kind, (some,) if isinstance(some, str) else tuple(some)) for kind, some in lists.items()))


class Tried:
    """Counts texts, and raises an error if words are of no use in any of them.

    Attributes:
      texts: the number of texts so far.
      met: whether words were of use in any.
    """

    def __init__(self, op: str, shown: Sequence[str]):
        self.op, self.shown, self.texts, self.met = op, ", ".join(shown[:3]), 0, False

    def __call__(self, met: bool) -> None:
        """Counts a text; raises `DataError` if words are of use in none of the first `TRIED` texts."""
        self.met = self.met or met
        self.texts += 1
        if self.texts >= TRIED and not self.met:
            raise DataError(
                f"op `{self.op}`: its words ({self.shown}, ...) are of no use in {TRIED:,} texts; give words "
                "of these texts"
            )


@functools.lru_cache(256)
def tried(op: str, words: Any, *options: Hashable) -> Tried:
    """Returns the counter of an op with some words and options, one a process; `words.shown` is for the message."""
    return Tried(op, words.shown)
