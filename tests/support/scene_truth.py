"""Whether a text on a scene is true, by a grammar of its own: what it names is looked up in the record's objects."""

import functools
import re

from vlm_jax.data.scenes import words

NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
COLOURS = "red|yellow|green|blue|purple|grey"
RELATIONS = "to the left of|to the right of|above|below|inside|that is bigger than|that is smaller than"


@functools.cache
def _phrase() -> str:
    names = {thing.name for thing in words.things()} | {thing.plural for thing in words.things()}
    either = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return (
        r"(?P<n{0}>a|an|two|three|four|five|six) (?P<size{0}>big |small )?(?P<turn{0}>upside-down |tilted )?"
        rf"(?P<colour{{0}}>(?:{COLOURS}) )?(?P<name{{0}}>{either})"
        r"(?: that (?:is|are) (?P<late{0}>upside-down|tilted))?"
    )


@functools.cache
def _patterns():
    one = re.compile(_phrase().format(""))
    two = re.compile(f"{_phrase().format(1)} (?P<relation>{RELATIONS}) {_phrase().format(2)}")
    return one, two


@functools.cache
def _singular():
    return {thing.plural: thing.name for thing in words.things()} | {thing.name: thing.name for thing in words.things()}


def _found(match, at: str, objects) -> list[int] | None:
    """The objects that a phrase means, None if it says something false of them, or their number."""
    wanted = {match[f"{role}{at}"].strip() for role in ("size", "turn", "colour", "late") if match[f"{role}{at}"]}
    name, number = match[f"name{at}"], NUMBERS[match[f"n{at}"]]
    there = [i for i, named in enumerate(objects["name"]) if named == _singular()[name]]
    right = len(there) == number and all(wanted <= {*objects["attributes"][i]} for i in there)
    return there if right else None


def holds(relation: str, a, b) -> bool:
    """A relation between boxes (x0, y0, x1, y1)."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = a, b
    longer = lambda x0, y0, x1, y1: max(x1 - x0, y1 - y0)
    return {
        "to the left of": ax1 <= bx0,
        "to the right of": bx1 <= ax0,
        "above": ay1 <= by0,
        "below": by1 <= ay0,
        "inside": bx0 <= ax0 and by0 <= ay0 and ax1 <= bx1 and ay1 <= by1,
        "that is bigger than": longer(*a) >= 1.6 * longer(*b),
        "that is smaller than": longer(*b) >= 1.6 * longer(*a),
    }[relation]


def is_true(caption: str, objects) -> bool:
    """Returns whether a short caption is true; raises ValueError if it is no English of this kind."""
    body = re.sub("^(a picture of|a drawing of|an image of) ", "", caption)
    one, two = _patterns()
    match = two.fullmatch(body)
    if match:
        a, b = _found(match, "1", objects), _found(match, "2", objects)
        if a is None or b is None:
            return False
        return holds(match["relation"], objects["box"][a[0]], objects["box"][b[0]])
    parts = re.split(", | and ", body)
    matches = [one.fullmatch(part) for part in parts]
    if not all(matches):
        raise ValueError(f"cannot read {caption!r}")
    return all(_found(match, "", objects) is not None for match in matches)


def is_english(caption: str) -> bool:
    """Returns whether numbers and articles agree with what follows them."""
    for match in _patterns()[0].finditer(caption):
        number, name = match["n"], match["name"]
        if (NUMBERS[number] == 1) != (name in {thing.name for thing in words.things()}) and (
            _singular()[name] != name or NUMBERS[number] == 1
        ):
            return False
        if NUMBERS[number] == 1 and number != words.article(caption[match.end("n") + 1 :]):
            return False
    return True
