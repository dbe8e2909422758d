"""A scene: which objects stand where. A pure function of (options, split, index), by Python's own random numbers.

    scene = draw_scene(Options(), "train", 7)      a Scene; scene.objects, scene.boxes, scene.relations
    scene.image                                    uint8 [height, width, 3]

Kinds of scenes: several different things (most), one thing, some things of one kind ("three foxes", perhaps beside
others), a small thing in front of a big one ("inside").
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.data.emoji import alpha
from vlm_jax.data.emoji.splits import TRAIN_STYLES
from vlm_jax.data.scenes import pictures, words
from vlm_jax.data.scenes.backgrounds import Background

SPLITS = ("train", "unseen_style", "unseen_concepts", "unseen_pairs")
RELATIONS = ("left", "above", "inside", "bigger")
BIGGER = 1.6  # ratio of the longer sides of two boxes
BIG, SMALL, PLAIN = (26, 32), (12, 16), (16, 24)  # longer side, in 1/64 of the canvas's shorter side
ALONE = (24, 48)
COLOURED, TURNED, SIZED, MIRRORED = 0.4, 0.2, 0.4, 0.3  # shares of things, of scenes for SIZED
ANGLES = (-45, -40, -35, -30, -25, 25, 30, 35, 40, 45)
HARD_TO_SEE = ("grey", "upside-down", "tilted")  # on some drawings: pictures.visible
VISIBLE = 0.8  # least share of an object that nothing in front hides
TRIES = 30


@dataclasses.dataclass(frozen=True)
class Options:
    """What the scenes of one source share.

    Attributes:
      width, height: pixels.
      objects: (fewest, most).
      background: "plain", "textured" or "any".
      styles: the styles to draw from; () for those of the split.
      seed: another seed, other scenes.
    """

    width: int = 64
    height: int = 64
    objects: tuple[int, int] = (1, 4)
    background: str = "any"
    styles: tuple[str, ...] = ()
    seed: int = 0


class Look(NamedTuple):
    """A thing with its attributes: all objects of one look are a group, such as "three small foxes"."""

    thing: words.Thing
    size: str = ""  # "big", "small"
    turn: str = ""  # "upside-down", "tilted"
    colour: str = ""

    @property
    def attributes(self) -> tuple[str, ...]:
        """The attributes in the order of English adjectives."""
        return tuple(filter(None, (self.size, self.turn, self.colour)))


class Object(NamedTuple):
    """One object: its look, and where and how it is drawn."""

    group: int  # index in Scene.looks
    side: int
    angle: float
    mirrored: bool
    x: int = 0  # of the left upper corner
    y: int = 0

    def rectangle(self, pixels: np.ndarray) -> tuple[int, int, int, int]:
        """(x0, y0, x1, y1) of the drawing `pixels` [h, w, 4] at its place."""
        return (self.x, self.y, self.x + pixels.shape[1], self.y + pixels.shape[0])


@dataclasses.dataclass(frozen=True)
class Scene:
    """A scene and its truth.

    Attributes:
      key: names (seed, split, index), for random numbers that follow.
      style: of all objects.
      looks: the different things, at most one of each concept.
      objects: in the order in which they are drawn, the last one in front.
      unseen: what no training scene has, "attribute" (of the first look) or "pair"; "" outside `unseen_pairs`.
    """

    key: str
    options: Options
    split: str
    style: str
    looks: tuple[Look, ...]
    objects: tuple[Object, ...]
    background: Background
    unseen: str = ""

    @functools.cached_property
    def sprites(self) -> list[np.ndarray]:
        return [_sprite(self.style, self.looks[o.group], o) for o in self.objects]

    @functools.cached_property
    def image(self) -> np.ndarray:
        """uint8 [height, width, 3]."""
        canvas = self.background.draw(self.options.width, self.options.height)
        for o, pixels in zip(self.objects, self.sprites, strict=True):
            height, width = pixels.shape[:2]
            part = canvas[o.y : o.y + height, o.x : o.x + width]
            under = part * (255 - pixels[..., 3:]).astype(np.uint16) + 128
            under += under >> 8
            under >>= 8
            part[:] = under + pixels[..., :3]
        return canvas

    @functools.cached_property
    def masks(self) -> list[np.ndarray]:
        """bool [height, width] of each object: where it is seen, alpha >= 128 and nothing in front."""
        owner = np.full((self.options.height, self.options.width), -1, np.int8)
        for i, (o, pixels) in enumerate(zip(self.objects, self.sprites, strict=True)):
            height, width = pixels.shape[:2]
            owner[o.y : o.y + height, o.x : o.x + width][pictures.covers(pixels)] = i
        return [owner == i for i in range(len(self.objects))]

    @functools.cached_property
    def boxes(self) -> list[tuple[int, int, int, int]]:
        """(x0, y0, x1, y1) of each mask, in pixels, x1 and y1 exclusive."""
        if self.inside:
            return [_box(mask) for mask in self.masks]
        covers = map(pictures.covers, self.sprites)
        return [_box(mask, o.x, o.y) for mask, o in zip(covers, self.objects, strict=True)]

    @property
    def inside(self) -> bool:
        """Whether the last object stands in front of the first one; no others overlap."""
        if len(self.objects) < 2:
            return False
        (a, b), (p, q) = (self.objects[0], self.objects[-1]), (self.sprites[0], self.sprites[-1])
        return overlaps(a.rectangle(p), b.rectangle(q), gap=0)

    @property
    def visible(self) -> float:
        """The share of the first object that the last one does not hide; 1.0 unless `inside`."""
        return float(self.masks[0].sum() / pictures.covers(self.sprites[0]).sum()) if self.inside else 1.0

    @functools.cached_property
    def relations(self) -> list[tuple[int, str, int]]:
        """(object, relation, object) for RELATIONS; right, below and smaller are their converses."""
        found = []
        for i, a in enumerate(self.boxes):
            for j, b in enumerate(self.boxes):
                if i != j:
                    found += [(i, name, j) for name in RELATIONS if holds(name, a, b)]
        return found

    @functools.cached_property
    def counts(self) -> list[int]:
        """The number of objects of each look."""
        return [sum(o.group == g for o in self.objects) for g in range(len(self.looks))]

    def random(self, purpose: str) -> random.Random:
        """Random numbers of their own for each purpose."""
        return random.Random(f"{self.key}/{purpose}")


def holds(relation: str, a: Sequence[int], b: Sequence[int]) -> bool:
    """Returns whether boxes (x0, y0, x1, y1) stand in a relation.

    left: a ends before b begins; above likewise; inside: a lies within b; bigger: a's longer side is 1.6 times b's.
    """
    if relation == "left":
        return a[2] <= b[0]
    if relation == "above":
        return a[3] <= b[1]
    if relation == "inside":
        return a[0] >= b[0] and a[1] >= b[1] and a[2] <= b[2] and a[3] <= b[3]
    if relation == "bigger":
        return max(a[2] - a[0], a[3] - a[1]) >= BIGGER * max(b[2] - b[0], b[3] - b[1])
    raise ValueError(f"unknown relation {relation!r}; expected one of {', '.join(RELATIONS)}")


def _box(mask: np.ndarray, x: int = 0, y: int = 0) -> tuple[int, int, int, int]:
    (rows,), (columns,) = np.nonzero(mask.any(1)), np.nonzero(mask.any(0))
    return (x + int(columns[0]), y + int(rows[0]), x + int(columns[-1]) + 1, y + int(rows[-1]) + 1)


def _sprite(style: str, look: Look, o: Object) -> np.ndarray:
    return pictures.sprite(style, look.thing.concept, o.side, colour=look.colour, angle=o.angle, mirrored=o.mirrored)


def overlaps(a: Sequence[int], b: Sequence[int], gap: int = 1) -> bool:
    """Returns whether two rectangles share a pixel, or come closer than `gap`."""
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap


# --- drawing lots ---------------------------------------------------------------------------------------------------


def below(rng: random.Random, n: int) -> int:
    """Returns a number below n; `random()` alone is the same in every version of Python."""
    return int(rng.random() * n)


def pick(rng: random.Random, values: Sequence[Any]) -> Any:
    """Returns one of the values."""
    return values[int(rng.random() * len(values))]


def between(rng: random.Random, bounds: tuple[int, int]) -> int:
    """Returns a number of a closed range."""
    return bounds[0] + below(rng, bounds[1] - bounds[0] + 1)


@functools.lru_cache(64)
def pool(split: str, styles: tuple[str, ...]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Returns (style, indices of the things that it has) of a split."""
    styles = styles or (("noto",) if split == "unseen_style" else TRAIN_STYLES)
    held_out = split == "unseen_concepts"
    things = [(i, thing) for i, thing in enumerate(words.things()) if thing.held_out == held_out]
    return tuple(
        (style, tuple(i for i, thing in things if (style, thing.concept) in alpha.places())) for style in styles
    )


def draw_scene(options: Options, split: str, index: int) -> Scene:
    """Returns the scene of an index, a whole number of any size."""
    key = f"{options.seed}/{split}/{index}"
    rng = random.Random(key)
    style, candidates = pick(rng, pool(split, options.styles))
    counts, inside = _numbers(rng, *options.objects)
    unseen = pick(rng, ("attribute", "pair") if len(counts) > 1 else ("attribute",)) if split == "unseen_pairs" else ""
    while True:  # until the split's condition holds, all fit and all are seen
        looks = _looks(rng, style, candidates, len(counts), inside, unseen)
        objects = looks and _place(rng, options, style, looks, counts, inside)
        if objects:
            background = Background.draw_lots(rng, options.background)
            scene = Scene(key, options, split, style, looks, objects, background, unseen)
            if scene.visible >= VISIBLE:
                return scene


def _numbers(rng: random.Random, fewest: int, most: int) -> tuple[list[int], bool]:
    """Draws the number of objects of each thing, and whether the second stands inside the first."""
    lot = rng.random()
    if lot < 0.2 and most >= 2:  # a number of one kind
        counts = [between(rng, (max(2, fewest - 1), most))]
        if counts[0] < most and (counts[0] < fewest or rng.random() < 0.5):
            counts.append(between(rng, (max(1, fewest - counts[0]), most - counts[0])))
        return counts, False
    if lot < 0.3 and fewest <= 2 <= most:
        return [1, 1], True
    if lot < 0.45 and fewest == 1:
        return [1], False
    return [1] * between(rng, (min(max(2, fewest), most), max(fewest, min(most, 4)))), False


def _looks(rng, style: str, candidates: Sequence[int], n: int, inside: bool, unseen: str) -> tuple[Look, ...] | None:
    """Draws n things that nobody confuses, and their attributes; None if the lot is void."""
    sized = inside or rng.random() < SIZED
    looks: list[Look] = []
    confused, things = words.confused(), words.things()
    for _ in range(TRIES):
        strange = len(looks) == 1 and unseen == "pair"
        i = pick(rng, _partners(looks[0].thing.index, candidates) or candidates if strange else candidates)
        if any(confused[i, look.thing.index] for look in looks):
            continue
        held_out = any(words.pair_held_out(things[i].hexcode, look.thing.hexcode) for look in looks)
        if held_out != strange:
            continue
        size = ("big", "small")[len(looks)] if inside else ""
        look = _look(rng, style, things[i], sized, size, unseen=unseen == "attribute" and not looks)
        if look is None:
            continue
        looks.append(look)
        if len(looks) == n:
            return tuple(looks)
    return None


@functools.lru_cache(1 << 10)
def _partners(i: int, candidates: tuple[int, ...]) -> tuple[int, ...]:
    """The things that stand beside thing i in no training scene."""
    code = words.things()[i].hexcode
    return tuple(j for j in candidates if words.pair_held_out(code, words.things()[j].hexcode))


def _look(rng, style: str, thing: words.Thing, sized: bool, size: str, unseen: bool) -> Look | None:
    """Draws attributes that can be seen: none of those held out, or exactly one if `unseen`."""
    visible = pictures.visible(style, thing.concept)
    drawn = {
        "size": size or (pick(rng, ("big", "small")) if sized else ""),
        "turn": pick(rng, ("upside-down", "tilted")) if rng.random() < TURNED else "",
        "colour": pick(rng, tuple(pictures.COLOURS)) if rng.random() < COLOURED else "",
    }
    look = Look(thing, **{name: a for name, a in drawn.items() if a not in HARD_TO_SEE or a in visible})
    held_out = [a for a in look.attributes if words.cell_held_out(a, thing.hexcode)]
    return look if len(held_out) == unseen else None


def _place(rng, options: Options, style: str, looks, counts, inside: bool) -> tuple[Object, ...] | None:
    """Draws objects with places, None if they do not fit."""
    objects = []
    for group, (look, count) in enumerate(zip(looks, counts, strict=True)):
        alone = sum(counts) == 1
        objects += [turned(rng, look, Object(group, 0, 0, False), options, alone) for _ in range(count)]
    taken: list[tuple[int, int, int, int]] = []
    placed: list[Object] = []
    for o in objects if inside else sorted(objects, key=lambda o: -o.side):
        pixels = pictures.sprite(style, looks[o.group].thing.concept, o.side, angle=o.angle)
        height, width = pixels.shape[:2]
        if width > options.width or height > options.height or not pictures.covers(pixels).any():
            return None
        if inside and taken:
            o = _within(rng, taken[0], o, width, height)
            return (*placed, o) if o else None
        for _ in range(TRIES):
            spot = o._replace(x=below(rng, options.width - width + 1), y=below(rng, options.height - height + 1))
            rectangle = spot.rectangle(pixels)
            if not any(overlaps(rectangle, other) for other in taken):
                taken.append(rectangle)
                placed.append(spot)
                break
        else:
            return None
    return tuple(placed)


def turned(rng: random.Random, look: Look, o: Object, options: Options, alone: bool = False) -> Object:
    """Returns an object with a side and an angle that its look asks for."""
    low, high = {"big": BIG, "small": SMALL, "": ALONE if alone else PLAIN}[look.size]
    side = round(between(rng, (low, high)) * min(options.width, options.height) / 64)
    angle = {"": 0, "upside-down": 180, "tilted": pick(rng, ANGLES)}[look.turn]
    return o._replace(side=side, angle=angle, mirrored=rng.random() < MIRRORED)


def _within(rng, outer: Sequence[int], o: Object, width: int, height: int) -> Object | None:
    """The object at a place within the middle of a rectangle, None if it is too large for it."""
    x0, y0, x1, y1 = outer
    margin_x, margin_y = (x1 - x0 - width) // 3, (y1 - y0 - height) // 3
    if margin_x < 1 or margin_y < 1:
        return None
    free = lambda start, end, side, margin: between(rng, (start + margin, end - margin - side))
    return o._replace(x=free(x0, x1, width, margin_x), y=free(y0, y1, height, margin_y))
