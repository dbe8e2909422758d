"""The order in which an epoch takes the examples of a source: a pure function of (seed, epoch, position).

`full` is a permutation drawn from all. `windowed` suits storage that is faster from front to back: it shuffles blocks
of consecutive examples, and mixes the examples of some blocks at a time.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from vlm_jax import config
from vlm_jax.errors import UserError

HELD = 2**20  # numbers of a permutation in memory
BLOCKS, SHIFT, MIX = 1, 2, 3  # uses of an epoch's randomness, apart from a full order


def full(seed: int, epoch: int, n: int) -> Sequence[int]:
    """Returns an epoch's permutation of range(n): an array up to 8 MB, computed index by index above."""
    return _full(seed, n)(epoch)


@functools.lru_cache(maxsize=64)
def _full(seed: int, n: int):
    """Epoch -> permutation; holds the last two of each source."""

    @functools.lru_cache(maxsize=2)
    def order(epoch):
        if n <= HELD:
            return np.random.default_rng((seed, epoch)).permutation(n)
        # A cipher over the indices needs no memory. On small ranges it walks long cycles (2 ms per index at n=40).
        return grain.MapDataset.range(n).shuffle(seed=(seed * 1_000_003 + epoch) % 2**32)

    return order


@dataclasses.dataclass(frozen=True)
class Windows:
    """Settings of the windowed order.

    A batch is cut into `lanes` equal stretches of rows; each lane goes through its own share of the shuffled blocks, in
    windows of its own. So a host that reads part of a batch's rows reads that part of the data: `lanes` should be a
    multiple of the number of hosts. The order is the same for any number.

    Attributes:
      block: consecutive examples that stay together until they are mixed.
      window: blocks of a lane whose examples are mixed.
      lanes: parts of a batch. `block * window * lanes` examples are mixed at a time.
    """

    block: int = 256
    window: int = 16
    lanes: int = 16


def windows_of(order: str | Mapping[str, Any] | None, remote: bool, where: str) -> Windows | None:
    """Returns the windows of a config's `order`, None for the full order.

    Args:
      order: "full", "windowed", or dict(name="windowed", block=256, window=16, lanes=16); None is "windowed" for a
        source in a store, and "full" for others.
      remote: whether the source is in a store.
      where: the source's section of the config, for messages.
    """
    if order is None:
        return Windows() if remote else None
    section = {"name": order} if isinstance(order, str) else order
    name = section.get("name") if isinstance(section, Mapping) else None
    if name not in ("full", "windowed") or (name == "full" and len(section) > 1):
        raise UserError(
            f"{where}.order is {order!r:.80}; expected 'full', 'windowed', or "
            "dict(name='windowed', block=256, window=16, lanes=16)"
        )
    if name == "full":
        return None
    rest = {key: value for key, value in section.items() if key != "name"}
    windows = config.call(Windows, rest, f"{where}.order")
    config.check_least(1, f"{where}.order", **dataclasses.asdict(windows))
    if windows.block * windows.window > HELD:
        raise UserError(
            f"{where}.order mixes {windows.block * windows.window:,} examples a lane; at most {HELD:,} can be"
        )
    return windows


@functools.lru_cache(maxsize=128)
def windowed(seed: int, epoch: int, n: int, rows: int, windows: Windows) -> "Windowed":
    """Returns the windowed order of an epoch, arguments as of `Windowed`."""
    return Windowed(seed, epoch, n, rows, windows)


class Windowed(Sequence):
    """The windowed order of an epoch; it remembers the permutations of a few windows.

    Args:
      seed, epoch: its randomness.
      n: examples of the source.
      rows: examples of the source in a batch.
      windows: sizes.
    """

    def __init__(self, seed: int, epoch: int, n: int, rows: int, windows: Windows):
        self.n, self.rows, self.block, self.span = n, rows, windows.block, windows.block * windows.window
        self.lanes = min(windows.lanes, rows)
        self.firsts = [-(-lane * rows // self.lanes) for lane in range(self.lanes + 1)]
        whole, rest = divmod(n, rows)
        widths = [self.firsts[i + 1] - self.firsts[i] for i in range(self.lanes)]
        lengths = [whole * w + min(max(rest - c, 0), w) for w, c in zip(widths, self.firsts, strict=False)]
        self.widths, self.lengths = widths, lengths
        self.offsets = [0, *np.cumsum(lengths).tolist()]
        self.blocks, self.rest = divmod(n, self.block)
        draws = np.random.default_rng((seed, epoch, SHIFT))
        self.short = int(draws.integers(self.blocks + 1)) * self.block  # where the short block comes
        self.shift = int(draws.integers(n)) if n else 0  # other neighbours share a block in each epoch
        self.shuffled = full(int(np.random.SeedSequence((seed, BLOCKS)).generate_state(1)[0]), epoch, self.blocks)
        self.mixed = functools.lru_cache(maxsize=2 * self.lanes + 2)(
            lambda lane, window, size: np.random.default_rng((seed, epoch, MIX, lane, window)).permutation(size)
        )

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, at: int) -> int:
        lane, window, place = self.place(at)
        first = window * self.span
        size = min(self.span, self.lengths[lane] - first)
        return self._example(self.offsets[lane] + first + int(self.mixed(lane, window, size)[place]))

    def place(self, at: int) -> tuple[int, int, int]:
        """Returns the lane of a position, its window, and how many of the window's positions are before it."""
        batch, row = divmod(at, self.rows)
        lane = row * self.lanes // self.rows
        return lane, *divmod(batch * self.widths[lane] + row - self.firsts[lane], self.span)

    def _example(self, q: int) -> int:
        """Returns example q of the shuffled blocks one after the other."""
        if q < self.short:
            block, inside = divmod(q, self.block)
        elif q < self.short + self.rest:
            return (self.blocks * self.block + q - self.short + self.shift) % self.n
        else:
            block, inside = divmod(q - self.rest, self.block)
        return (int(self.shuffled[block]) * self.block + inside + self.shift) % self.n

    def block_of(self, lane: int, window: int, number: int) -> list[range] | None:
        """Returns the examples of a window's block as ranges; None if the lane has no such window."""
        begin = window * self.span + number * self.block
        if window * self.span >= self.lengths[lane]:
            return None
        q, end = self.offsets[lane] + begin, self.offsets[lane] + min(begin + self.block, self.lengths[lane])
        found = []
        while q < end:  # at most a few pieces: the borders of blocks, of the short one, and the end of the source
            first = self._example(q)
            ends = (end, self._border(q), q + self.n - first)
            found.append(range(first, first + min(ends) - q))
            q = min(ends)
        return found

    def _border(self, q: int) -> int:
        """Returns where the block of q ends."""
        if q < self.short:
            return (q // self.block + 1) * self.block
        if q < self.short + self.rest:
            return self.short + self.rest
        return self.rest + ((q - self.rest) // self.block + 1) * self.block
