"""Second pictures: one change of a scene, and the words for it."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

from vlm_jax.data.scenes import pictures
from vlm_jax.data.scenes.foils import ATTRIBUTES, OTHER_ATTRIBUTE, absent, allowed
from vlm_jax.data.scenes.scene import HARD_TO_SEE, VISIBLE, Look, Object, Scene, holds, overlaps, pick, turned
from vlm_jax.data.scenes.texts import caption, listed, phrase, shuffled, text
from vlm_jax.data.scenes.words import Thing

TRIES = 20


def edit(scene: Scene) -> dict[str, Any]:
    """Returns a second picture and the sentence that leads to it.

    Keys: `kind` ("replace", "remove", "colour"), `text` ("the same, but with a fox in the place of the cat"), `image`,
    and `caption`, the short caption of the second picture.
    """
    kind, after, sentence = edited(scene)
    return {"kind": kind, "text": sentence, "image": after.image, "caption": caption(after)}


def edited(scene: Scene) -> tuple[str, Scene, str]:
    """Returns (kind, second scene, sentence)."""
    rng = scene.random("edit")
    for kind in shuffled(rng, ("replace", "remove", "colour")):
        for _ in range(TRIES):
            group = pick(rng, range(len(scene.looks)))
            after, sentence = EDITS[kind](scene, group, rng)
            if after and fits(after):
                return kind, after, sentence
    raise AssertionError(f"{scene.key} offers no edit; a colour always fits")


def minimal_pair(scene: Scene) -> dict[str, Any]:
    """Returns a second picture that differs in one attribute, or in one thing, and captions that tell the two apart.

    Keys: `kind` ("colour", "turn", "size", "object"), `caption` (true of the first picture only), `image`, `text` (true
    of the second picture only). A scene whose things have no attributes differs in a thing.
    """
    kind, after = other_of_pair(scene)
    wording = scene.random("wording").random()  # of both captions
    said = [_all(one, random.Random(wording)) for one in (scene, after)]
    return {"kind": kind, "caption": said[0], "image": after.image, "text": said[1]}


def other_of_pair(scene: Scene) -> tuple[str, Scene]:
    """Returns (kind, second scene) of the minimal pair."""
    rng = scene.random("minimal_pair")
    for kind, group, look in _changes(scene, rng):
        after = changed(scene, group, look, rng)
        if fits(after):
            return kind, after
    raise AssertionError(f"{scene.key} has no minimal pair; another thing always fits")


def _all(scene: Scene, rng: random.Random) -> str:
    return text(listed([phrase(scene, group, rng) for group in range(len(scene.looks))]))


def _changes(scene: Scene, rng: random.Random) -> Iterator[tuple[str, int, Look]]:
    attributes = [
        (role, group, other)
        for group, look in enumerate(scene.looks)
        for role in ATTRIBUTES
        if getattr(look, role)
        for other in OTHER_ATTRIBUTE[getattr(look, role)]
        if can_have(scene, look, other)
    ]
    for role, group, other in shuffled(rng, attributes):
        yield role, group, scene.looks[group]._replace(**{role: other})
    while True:
        group = pick(rng, range(len(scene.looks)))
        thing = _other_thing(scene, group, rng)
        if thing:
            yield "object", group, scene.looks[group]._replace(thing=thing)


def _other_thing(scene: Scene, group: int, rng: random.Random) -> Thing | None:
    attributes = scene.looks[group].attributes
    return absent(scene, rng, lambda thing: all(can_have(scene, Look(thing), a) for a in attributes))


def can_have(scene: Scene, look: Look, attribute: str) -> bool:
    """Returns whether an attribute of the look's thing can be seen, and belongs into the scene's split."""
    seen = pictures.visible(scene.style, look.thing.concept)
    return (attribute not in HARD_TO_SEE or attribute in seen) and allowed(scene, attribute, look.thing)


def changed(scene: Scene, group: int, look: Look, rng: random.Random) -> Scene:
    """Returns the scene with another look for a group; its objects keep their middles."""
    old = scene.looks[group]
    objects = []
    for o in scene.objects:
        if o.group == group:
            new = turned(rng, look, o, scene.options) if (look.turn, look.size) != (old.turn, old.size) else o
            objects.append(_middle_kept(scene, o, new, look))
        else:
            objects.append(o)
    looks = (*scene.looks[:group], look, *scene.looks[group + 1 :])
    return dataclasses.replace(scene, key=f"{scene.key}/changed", looks=looks, objects=tuple(objects))


def _middle_kept(scene: Scene, old: Object, new: Object, look: Look) -> Object:
    before = pictures.sprite(scene.style, scene.looks[old.group].thing.concept, old.side, angle=old.angle)
    after = pictures.sprite(scene.style, look.thing.concept, new.side, angle=new.angle)
    x, y = (a + (b - c) // 2 for a, b, c in zip((old.x, old.y), before.shape[1::-1], after.shape[1::-1], strict=True))
    return new._replace(x=x, y=y)


def fits(scene: Scene) -> bool:
    """Returns whether all objects stand on the canvas, overlap only as "inside" does, and can be seen."""
    rectangles = [o.rectangle(pixels) for o, pixels in zip(scene.objects, scene.sprites, strict=True)]
    size = scene.options.width, scene.options.height
    on = all(x0 >= 0 and y0 >= 0 and x1 <= size[0] and y1 <= size[1] for x0, y0, x1, y1 in rectangles)
    for i, b in enumerate(rectangles):
        for a in rectangles[:i]:
            if overlaps(a, b, gap=0) and not (scene.inside and holds("inside", b, a)):
                return False
    return on and all(pictures.covers(pixels).any() for pixels in scene.sprites) and scene.visible >= VISIBLE


def _place(scene: Scene, group: int) -> str:
    look, one = scene.looks[group], scene.counts[group] == 1
    return look.thing.name if one else look.thing.plural


def _replace(scene: Scene, group: int, rng: random.Random) -> tuple[Scene | None, str]:
    thing = _other_thing(scene, group, rng)
    if not thing:
        return None, ""
    after = changed(scene, group, scene.looks[group]._replace(thing=thing), rng)
    new = text(phrase(after, group, rng))
    return after, f"the same, but with {new} in the place of the {_place(scene, group)}"


def _remove(scene: Scene, group: int, rng: random.Random) -> tuple[Scene | None, str]:
    if len(scene.looks) < 2:
        return None, ""
    looks = (*scene.looks[:group], *scene.looks[group + 1 :])
    kept = [o._replace(group=o.group - (o.group > group)) for o in scene.objects if o.group != group]
    after = dataclasses.replace(scene, key=f"{scene.key}/changed", looks=looks, objects=tuple(kept))
    return after, f"the same, but without the {_place(scene, group)}"


def _colour(scene: Scene, group: int, rng: random.Random) -> tuple[Scene | None, str]:
    look = scene.looks[group]
    free = [c for c in pictures.COLOURS if c != look.colour and can_have(scene, look, c)]
    if not free:
        return None, ""
    colour = pick(rng, free)
    be = "is" if scene.counts[group] == 1 else "are"
    after = changed(scene, group, look._replace(colour=colour), rng)
    return after, f"the same, but the {_place(scene, group)} {be} {colour}"


EDITS = {"replace": _replace, "remove": _remove, "colour": _colour}
