"""Backgrounds of scenes: light, so that every drawing stands out; a colour, or two colours in a pattern."""

from __future__ import annotations

import dataclasses
import random

import numpy as np

PATTERNS = ("gradient", "stripes", "checks", "spots")
LIGHT = 200  # darkest level of a channel
NEAR = 24  # levels between the two colours of a pattern, at most


@dataclasses.dataclass(frozen=True)
class Background:
    """A pattern in two colours; `period` in pixels, `along` x or y."""

    pattern: str
    first: tuple[int, int, int]
    second: tuple[int, int, int]
    period: int
    along: str

    @classmethod
    def draw_lots(cls, rng: random.Random, kind: str) -> Background:
        """Draws a background, "plain", "textured" or "any"."""
        plain = kind == "plain" or (kind == "any" and rng.random() < 0.5)
        first = tuple(LIGHT + int(rng.random() * (256 - LIGHT)) for _ in range(3))
        second = tuple(level - int(rng.random() * NEAR) for level in first)
        pattern, period = PATTERNS[int(rng.random() * len(PATTERNS))], 4 + int(rng.random() * 9)
        along = "xy"[int(rng.random() * 2)]
        return cls("plain" if plain else pattern, first, second, period, along)

    def draw(self, width: int, height: int) -> np.ndarray:
        """Returns uint8 [height, width, 3]."""
        first, second = np.array(self.first, np.uint8), np.array(self.second, np.uint8)
        canvas = np.empty((height, width, 3), np.uint8)
        canvas[:] = first
        if self.pattern == "plain":
            return canvas
        x, y = np.arange(width), np.arange(height)
        if self.pattern == "gradient":
            n = width if self.along == "x" else height
            ramp = np.linspace(first.astype(np.float32), second, n).astype(np.uint8)
            canvas[:] = ramp if self.along == "x" else ramp[:, None]
        elif self.pattern == "stripes":
            lines = (x if self.along == "x" else y) // self.period % 2 == 1
            canvas[(slice(None), lines) if self.along == "x" else lines] = second
        elif self.pattern == "checks":
            canvas[(x // self.period + y[:, None] // self.period) % 2 == 1] = second
        else:
            middle = (self.period - 1) / 2
            from_x, from_y = x % self.period - middle, (y % self.period - middle)[:, None]
            canvas[from_x**2 + from_y**2 < (0.35 * self.period) ** 2] = second
        return canvas
