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
        """Returns uint8 [height, width, 3]. Whole rows are copied: pixel by pixel would take ten times as long."""
        colours, x, y = np.array((self.first, self.second), np.uint8), np.arange(width), np.arange(height)
        if self.pattern == "gradient":
            n = width if self.along == "x" else height
            ramp = np.linspace(colours[0].astype(np.float32), colours[1], n).astype(np.uint8)
            if self.along == "x":
                return ramp[None][np.zeros(height, int)]
            canvas = np.empty((height, width, 3), np.uint8)
            for channel in range(3):
                canvas[..., channel] = ramp[:, None, channel]
            return canvas
        blocks_x, blocks_y = x // self.period % 2, y // self.period % 2
        if self.pattern == "stripes" and self.along == "x":
            return colours[blocks_x][None][np.zeros(height, int)]
        if self.pattern == "stripes":
            return np.repeat(colours[:, None], width, 1)[blocks_y]
        if self.pattern == "checks":
            return colours[[blocks_x, 1 - blocks_x]][blocks_y]
        if self.pattern == "spots":
            middle = (self.period - 1) / 2
            from_x, from_y = x % self.period - middle, np.arange(self.period)[:, None] - middle
            inside = from_x**2 + from_y**2 < (0.35 * self.period) ** 2
            return colours[inside.astype(int)][y % self.period]
        return np.repeat(colours[:1, None], width, 1)[np.zeros(height, int)]
