"""Whose turn it is: the sources of a row set by their weights, which are fixed or change with the step."""

import bisect
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from vlm_jax.errors import UserError

LEAST = 1e-9  # weight that is not 0
FINE = 2**20  # parts that a turn is owed in
PIECES = 100  # of constant weights that a change from one weight to another is made of
Points = tuple[tuple[int, float], ...]


def turns(position: int, weights: Sequence[int]) -> list[int]:
    """Returns how many of the first `position` turns each source has; exactly one has the next.

    The first source's turns are its share of all turns, rounded down; the second's its share of those left, and so on:
    over any stretch, the turns differ from the shares by less than the number of sources.
    """
    counts, left = [], sum(weights)
    for weight in weights:  # as `_turns`, at each example of each batch
        counts.append(position * weight // left)
        position, left = position - counts[-1], left - weight
    return counts


def _turns(position: int, weights: Sequence[int], owed: Sequence[int]) -> list[int]:
    """Returns `turns` in which each source's share begins with a part of a turn, of the weights that are left."""
    counts, left = [], sum(weights)
    for weight, part in zip(weights, owed, strict=True):
        counts.append((position * weight + part) // left if weight else 0)
        position, left = position - counts[-1], left - weight
    return counts


def _owed(position: int, weights: Sequence[int], owed: Sequence[int]) -> list[Fraction]:
    """Returns the part of a turn, in [0, 1), that rounding down still owes each source after `position` turns."""
    parts, left = [], sum(weights)
    for weight, part in zip(weights, owed, strict=True):
        count, rest = divmod(position * weight + part, left) if weight else (0, part)
        parts.append(Fraction(rest, max(left, 1)))
        position, left = position - count, left - weight
    return parts


def points_of(weight: Any, where: str) -> Points:
    """Returns a config's weight as (step, weight) pairs.

    Args:
      weight: a number; or pairs (step, weight), with straight lines between: `[(0, 3.0), (10_000, 1.0)]`. A step that
        comes twice is a jump. The weights before the first pair and after the last pair are theirs.
      where: its place in the config, for messages.

    Raises:
      UserError: the weight is neither, not finite, below 0, or never above 0.
    """
    is_number = lambda value: isinstance(value, int | float) and not isinstance(value, bool)
    if is_number(weight):
        if not LEAST <= weight < math.inf:
            raise UserError(f"{where} is {weight!r}; expected a number above 0")
        return ((0, weight),)
    pairs = weight if isinstance(weight, Sequence) and not isinstance(weight, str) else ()
    sound = pairs and all(isinstance(pair, Sequence) and len(pair) == 2 for pair in pairs)
    sound = sound and all(type(step) is int and step >= 0 and is_number(value) for step, value in pairs)
    sound = sound and all(value == 0 or LEAST <= value < math.inf for _, value in pairs)
    steps = [step for step, _ in pairs] if sound else []
    if not sound or steps != sorted(steps) or not any(value for _, value in pairs):
        raise UserError(
            f"{where} is {weight!r:.80}; expected a number above 0, or (step, weight) pairs in the steps' order, "
            "[(0, 3.0), (10000, 1.0)]"
        )
    return tuple((step, value) for step, value in pairs)


def value_at(points: Points, step: float) -> float:
    """Returns the weight after `step` steps."""
    i = bisect.bisect_right([at for at, _ in points], step)
    if i == 0 or i == len(points):
        return points[max(i - 1, 0)][1]
    (before, low), (after, high) = points[i - 1], points[i]
    return low + (high - low) * (step - before) / (after - before)


def fraction(weight: float) -> Fraction:
    """Returns the weight without the error of floats: 0.1 is 1/10."""
    return Fraction(weight).limit_denominator(10**9)


class Turns:
    """The turns of the sources of a row set of `size` rows.

    Args:
      weights: of each source, see `points_of`.
      size: rows of a batch.
    """

    def __init__(self, weights: Sequence[Points], size: int):
        self.starts, self.weights, self.before, self.owed, self.fixed = [], [], [], [], False
        pieces = _pieces(weights)
        for first, middle in pieces:
            values = [fraction(value_at(points, middle)) for points in weights]
            if not any(values):
                raise UserError(
                    f"all weights of the sources are 0 after {first} steps; give one of them a weight there"
                )
            whole = [(FINE if len(pieces) > 1 else 1) * value for value in _whole(values)]
            left = [sum(whole[i:]) for i in range(len(whole))]
            before, parts = [0] * len(weights), [Fraction()] * len(weights)
            if self.starts:
                before = self(first * size)
                parts = _owed(first * size - self.starts[-1], self.weights[-1], self.owed[-1])
            self.before.append(before)
            self.starts.append(first * size)
            self.weights.append(whole)
            self.owed.append([int(part * rest) for part, rest in zip(parts, left, strict=True)])
        self.fixed = len(pieces) == 1 and all(self.weights[0])

    def __call__(self, position: int) -> list[int]:
        """Returns how many of the first `position` turns each source has; exactly one has the next."""
        if self.fixed:
            return turns(position, self.weights[0])
        piece = bisect.bisect_right(self.starts, position) - 1
        own = _turns(position - self.starts[piece], self.weights[piece], self.owed[piece])
        return [before + count for before, count in zip(self.before[piece], own, strict=True)]

    def most(self, source: int, rows: int) -> int:
        """Returns how many of `rows` turns in a row a source may have, at most, rounded up."""
        return max(-(-rows * weights[source] // sum(weights)) for weights in self.weights)


def _pieces(weights: Sequence[Points]) -> list[tuple[int, float]]:
    """Returns (first step, middle) of stretches of steps over which the weights are taken to be constant."""
    steps = sorted({0, *(step for points in weights for step, _ in points)})
    found = []
    for first, last in itertools.pairwise(steps):
        ends = [(value_at(points, first), _before(points, last)) for points in weights]
        count = min(PIECES, last - first) if any(low != high for low, high in ends) else 1
        cuts = [first + (last - first) * i // count for i in range(count + 1)]
        found += [(begin, (begin + end - 1) / 2) for begin, end in itertools.pairwise(cuts)]
    return [*found, (steps[-1], steps[-1])]


def _before(points: Points, step: int) -> float:
    """Returns the weight just before a step, where there may be a jump."""
    at = bisect.bisect_left([own for own, _ in points], step)
    if at == len(points) or points[at][0] != step:
        return value_at(points, step)
    return points[at][1]


def _whole(weights: Sequence[Fraction]) -> list[int]:
    factor = math.lcm(*(weight.denominator for weight in weights))
    return [int(weight * factor) for weight in weights]
