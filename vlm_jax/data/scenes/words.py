"""What scenes are made of, in words: things with good English, and which of them must not be mistaken."""

from __future__ import annotations

import functools
import hashlib
import re
from typing import NamedTuple

import numpy as np

from vlm_jax.data import emoji
from vlm_jax.data.english import article, plural  # noqa: F401 (of things, too)

# No thing to put into a scene, or a picture that fills its square.
NO_THING = (
    "foggy; locked; unlocked; locked with pen; locked with key; speaker low volume; speaker medium volume; speaker "
    "high volume; hourglass done; hourglass not done; airplane departure; airplane arrival; cooking; construction; "
    "building construction; camping; wedding; performing arts; high voltage; chart increasing; chart decreasing; "
    "chart increasing with yen; landslide; night with stars; bridge at night; cityscape; cityscape at dusk; sunrise; "
    "sunrise over mountains; sunset; moon viewing ceremony; x-ray; national park; motorway; hot springs; pouring "
    "liquid; fog; film frames; desert; fireworks; wind face; hair pick; pick; mate; link; cyclone; horizontal traffic "
    "light; light rail; station; level slider; umbrella on ground; fork and knife; new moon; new moon face; first "
    "quarter moon; first quarter moon face; last quarter moon; last quarter moon face; waxing crescent moon; waning "
    "crescent moon; waxing gibbous moon; waning gibbous moon; tennis; bowling; field hockey; ice hockey; lacrosse; "
    "ping pong; badminton; cricket game; video game; drop of blood; paw prints; framed picture; joker; luggage; "
    "vertical traffic light; leaf fluttering in wind; pig nose; goal net; knot"
)
PROPER = (
    "mount fuji; Tokyo tower; Statue of Liberty; kaaba; milky way; map of Japan; globe showing Europe-Africa; globe "
    "showing Americas; globe showing Asia-Australia"
)
WITH_ATTRIBUTE = (
    "black bird; black cat; black nib; blue book; green book; orange book; brown mushroom; green apple; red apple; "
    "green salad; leafy green; leafless tree; long drum; magnifying glass tilted left; magnifying glass tilted right; "
    "mahjong red dragon; red envelope; red paper lantern; small airplane; sun behind small cloud; sun behind large "
    "cloud; white cane; white flower; low battery"
)
PLURAL = (
    "grapes; cherries; blueberries; peanuts; beans; pancakes; french fries; chopsticks; houses; skis; glasses; "
    "sunglasses; goggles; jeans; gloves; socks; briefs; shorts; ballet shoes; shopping bags; prayer beads; scissors; "
    "chains; bubbles; books; musical notes; maracas; control knobs; Japanese dolls; nesting dolls; admission tickets; "
    "sparkles; linked paperclips; crossed swords; clinking beer mugs; clinking glasses; flower playing cards; woman’s "
    "clothes; card index dividers; bookmark tabs; hammer and pick; hammer and wrench; nut and bolt; bow and arrow; "
    "couch and lamp; headphone"
)
MASS = (
    "bread; baguette bread; flatbread; stuffed flatbread; bacon; popcorn; butter; salt; canned food; garlic; ginger "
    "root; broccoli; cooked rice; curry rice; spaghetti; sushi; oden; dango; falafel; fondue; shaved ice; soft ice "
    "cream; ice cream; candy; custard; sake; ice; meat on bone; hot beverage; coral; wood; yarn; thread; soap; dna; "
    "fire; bubble tea; money with wings; seat"
)
# Nobody calls them upside-down or tilted, whatever is drawn on them.
ROUND = (
    "soccer ball; baseball; softball; basketball; volleyball; pool 8 ball; crystal ball; mirror ball; confetti ball; "
    "trackball; yo-yo; flying disc; pizza; cookie; doughnut; bagel; pie; moon cake; coin; full moon; sun; wheel; gear; "
    "compass; optical disk; dvd; computer disk; potato; egg; kiwi fruit; coconut; lemon; lime; tangerine; melon; "
    "olive; snowflake; rosette; rock; droplet; pill; bullseye; ring buoy; nazar amulet; spider web"
)
AWKWARD = re.compile("o’clock$|-thirty$| (with|without|behind|facing|in) ")  # clocks; "a house with garden"

# Pictures that look alike although the subgroups differ (within a subgroup nothing is offered as a wrong answer).
ALIKE = (
    "flatbread; coin; full moon; cookie; dvd; optical disk; softball; baseball; volleyball; fish cake with swirl; "
    "moon cake; pie; pizza; sun",
    "peanuts; adhesive bandage; bread; potato",
    "sports medal; military medal; rosette",
    "onion; egg; chestnut; garlic",
    "carp streamer; fish; tropical fish",
    "mouse trap; cheese wedge",
    "star; glowing star; sparkler",
    "teddy bear; bear; koala",
    "computer mouse; mouse; mouse face; rat",
    "Christmas tree; evergreen tree; tanabata tree; pine decoration",
    "tent; circus tent",
    "carousel horse; horse; horse face; unicorn",
    "jack-o-lantern; tangerine",
    "rocket; firecracker; bullet train",
    "globe with meridians; basketball",
    "umbrella; beach with umbrella; closed umbrella",
    "shield; military helmet; rescue worker’s helmet",
    "notebook; closed book; ledger",
    "television; desktop computer; laptop",
)


class Thing(NamedTuple):
    """A concept of the emoji that is singular and countable in English."""

    index: int  # in things()
    concept: int
    hexcode: str
    subgroup: str
    held_out: bool
    name: str
    plural: str
    names: dict[str, str]  # by language


def _listed(text: str) -> list[str]:
    return text.split("; ")


@functools.cache
def things() -> tuple[Thing, ...]:
    """Returns all things, by id of the concept."""
    out = {*_listed(NO_THING), *_listed(PROPER), *_listed(WITH_ATTRIBUTE), *_listed(PLURAL), *_listed(MASS)}
    rows = [
        row
        for row in emoji.concept_table()
        if row["group"] in (3, 4, 5, 6, 7) and row["names"]["en"] not in out and not AWKWARD.search(row["names"]["en"])
    ]
    return tuple(
        Thing(i, row["id"], row["hexcode"], row["subgroup"], row["held_out"], name, plural(name), row["names"])
        for i, row in enumerate(rows)
        for name in (row["names"]["en"],)
    )


@functools.cache
def without_up() -> frozenset[int]:
    """Returns the concepts of round things, which have no right way up."""
    return frozenset(thing.concept for thing in things() if thing.name in _listed(ROUND))


@functools.cache
def confused() -> np.ndarray:
    """Returns bool [things, things]: one may pass for the other, by a common word, by looks, or as its kind."""
    named = [set(re.findall(r"[\w-]+", thing.name.lower())) for thing in things()]
    groups = [*map(_listed, ALIKE)]
    alike = [{i for i, names in enumerate(groups) if thing.name in names} for thing in things()]
    rows = list(zip(named, alike, things(), strict=True))
    kind = lambda words, other: not words.isdisjoint(KINDS.get(other.subgroup, ()))
    return np.array(
        [
            [bool(a & b or g & h) or (s.subgroup == t.subgroup and (kind(a, t) or kind(b, s))) for b, h, t in rows]
            for a, g, s in rows
        ]
    )


# Words for the whole kind: a bird is among all birds, an automobile among all cars.
KINDS = {
    "animal-mammal": ("dog", "cat", "monkey", "horse", "cow", "ox", "pig", "bear", "mouse", "rat", "wolf", "camel"),
    "animal-bird": ("bird", "chicken", "rooster", "goose", "duck", "swan", "dove", "eagle"),
    "animal-marine": ("fish", "whale", "shark", "shrimp", "lobster", "dolphin", "squid", "octopus"),
    "animal-bug": ("bug", "beetle", "ant", "fly", "spider", "cricket", "cockroach"),
    "animal-reptile": ("dragon", "sauropod", "t-rex", "lizard"),
    "plant-flower": ("blossom", "rose", "hibiscus", "rosette", "bouquet"),
    "plant-other": ("tree", "seedling", "shamrock", "herb"),
    "transport-ground": ("automobile", "taxi", "train", "tram", "locomotive", "metro", "monorail", "truck", "bus"),
    "transport-water": ("ship", "ferry", "speedboat", "sailboat"),
    "clothing": ("purse", "handbag", "shoe", "hat"),
    "book-paper": ("notebook", "ledger", "page", "scroll", "bookmark"),
    "place-building": ("house", "hotel", "bank", "castle", "hospital", "school", "hut", "factory"),
    "place-religious": ("church", "mosque", "synagogue"),
    "time": ("watch",),
    "sky-weather": ("star", "comet", "sun", "cloud"),
    "office": ("calendar", "clipboard", "pushpin"),
    "mail": ("envelope", "e-mail", "package", "postbox"),
    "money": ("receipt", "banknote"),
    "music": ("radio", "microphone"),
    "computer": ("keyboard", "printer"),
    "writing": ("pencil", "pen", "crayon", "paintbrush"),
}

# --- combinations that no training scene shows ----------------------------------------------------------------------

HELD_OUT_CELLS = 0.2  # of (attribute, thing)
HELD_OUT_PAIRS = 0.05  # of unordered pairs of things


def _share(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32


@functools.lru_cache(1 << 14)
def cell_held_out(attribute: str, hexcode: str) -> bool:
    """Returns whether an attribute of a thing is kept for the split `unseen_pairs`."""
    return _share(f"{attribute}|{hexcode}") < HELD_OUT_CELLS


@functools.lru_cache(1 << 17)
def pair_held_out(first: str, second: str) -> bool:
    """Returns whether two things, by hexcode in either order, stand together in `unseen_pairs` only."""
    return _share("|".join(sorted((first, second)))) < HELD_OUT_PAIRS
