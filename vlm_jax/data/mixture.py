"""The rows of a batch and the sources that fill them: one source, or a mixture of several by weights.

The sources of one row set take turns, example by example: a pure function of the example's number, so that any process
or worker finds any row of any batch.
"""

import copy
import dataclasses
import itertools
import logging
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax import config
from vlm_jax.data import ops as ops_lib
from vlm_jax.data import order as orders
from vlm_jax.data.examples import SUBSTITUTES, BadRecord, Examples, open_examples
from vlm_jax.data.naflex import WHERE as NAFLEX
from vlm_jax.data.naflex import Buckets
from vlm_jax.data.rows import Batch
from vlm_jax.data.turns import Points, Turns, fraction, points_of, value_at
from vlm_jax.errors import UserError

log = logging.getLogger(__name__)
ANNOUNCED = 2**14  # blocks that a row set remembers having told its sources of


@dataclasses.dataclass(frozen=True)
class Part:
    """A source of a batch.

    Attributes:
      uri, ops, split, where, index, limit, reinforced, order: as of `loader.train_loader`.
      weight: share of the batch, up to a factor; a number, or pairs (step, weight), see `turns.points_of`.
      rows: name of the row set that the source's examples form, with the other sources of that name.
    """

    uri: str
    ops: str
    split: str | None = None
    where: Mapping[str, Iterable[Any]] | None = None
    index: str | None = None
    limit: int | None = None
    reinforced: str | None = None
    order: str | Mapping[str, Any] | None = None
    weight: float | Sequence[Sequence[float]] = 1.0
    rows: str = "batch"


def parts(sources: Mapping[str, Mapping[str, Any]]) -> dict[str, Part]:
    """Returns the parts of a config's `data.sources`, by name, in the names' order.

    Raises:
      UserError: a section has an unknown key, lacks one, or its weight is no weight.
    """
    if not isinstance(sources, Mapping) or not sources:
        raise UserError(f"config.data.sources is {sources!r}; expected dict(NAME=dict(uri=..., ops=..., weight=...))")
    found = {}
    for name, section in sorted(sources.items()):
        where = f"config.data.sources.{name}"
        if not isinstance(section, Mapping):
            raise UserError(f"{where} is {section!r}; expected dict(uri=..., ops=..., weight=...)")
        part = found[name] = config.call(Part, section, where)
        _points(name, part)
    return found


def sizes(sources: Mapping[str, Mapping[str, Any]] | None, batch_size: int) -> int | dict[str, int]:
    """Returns the rows of a batch: `batch_size`, or {row set: rows} if the sources form other row sets than "batch".

    A row set's rows are `batch_size` times the weights of its sources over all weights, those of the first step.

    Raises:
      UserError: that is no whole number.
    """
    found = {} if sources is None else _sizes(parts(sources), batch_size)
    return found if set(found) - {"batch"} else batch_size


def row_sets(
    parts: Mapping[str, Part],
    batch_size: int,
    seed: int,
    tokenizer: Any,
    rows: Sequence[int] | Mapping[str, Sequence[int]] | None,
) -> dict[str, "RowSet"]:
    """Opens the sources and returns the row sets of a batch by name; arguments as of `loader.train_loader`.

    Raises:
      UserError: a source has fewer examples than a batch takes, or the ops of a mixture lack `keep`.
    """
    sizes, sets = _sizes(parts, batch_size), {}
    for name, size in sizes.items():
        own = {source: part for source, part in parts.items() if part.rows == name}
        slots = rows[name] if isinstance(rows, Mapping) else rows
        sets[name] = _row_set(own, size, batch_size, seed, tokenizer, slots)
    return sets


def row_sets_by_length(
    parts: Mapping[str, Part],
    buckets: Buckets,
    seed: int,
    tokenizer: Any,
    rows: Mapping[int, Sequence[int]] | None,
) -> dict[int, dict[str, "RowSet"]]:
    """Like `row_sets`, for each length of `data.naflex`: all read on in one stream of examples."""
    if {part.rows for part in parts.values()} != {"batch"}:
        raise UserError(f"{NAFLEX} is for one row set, `batch`; config.data.sources has others: leave out `rows`")
    first, largest = buckets.lengths[0], max(buckets.sizes.values())
    base = _row_set(parts, largest, largest, seed, tokenizer, None, buckets)
    found = {}
    for length, size in buckets.sizes.items():
        own = found[length] = copy.copy(base)
        own.size, own.slots = size, [int(row) for row in (range(size) if rows is None else rows[length])]
        if length != first:
            pipelines = [ops_lib.parse(part.ops, tokenizer, length) for part in parts.values()]
            own.sources = [one.through(ops) for one, ops in zip(base.sources, pipelines, strict=True)]
    return {length: {"batch": own} for length, own in found.items()}


def _row_set(
    parts: Mapping[str, Part],
    size: int,
    batch_size: int,
    seed: int,
    tokenizer: Any,
    slots: Sequence[int] | None,
    buckets: Buckets | None = None,
) -> "RowSet":
    """Opens a row set of `size` rows; with buckets, `size` is the largest, and its pictures have the first length."""
    step, whole, length = (size, size, None) if buckets is None else (buckets.mean, buckets.round, buckets.lengths[0])
    turns = Turns([_points(*one) for one in parts.items()], step)
    sources = [_open(source, part, seed, tokenizer, length) for source, part in parts.items()]
    for i, (part, examples) in enumerate(zip(parts.values(), sources, strict=True)):
        most = turns.most(i, size)
        if len(examples) < most:
            chosen = [f"{key}={getattr(part, key)}" for key in ("index", "where", "limit") if getattr(part, key)]
            after = f" after {' and '.join(chosen)}" if chosen else ""
            needed = f"batch_size={batch_size}" if most == batch_size else f"its {most} of a batch of {batch_size}"
            raise UserError(f"data set `{part.uri}` has {len(examples)} examples{after}, fewer than {needed}")
    windows = [_windows(*one) for one in zip(parts, parts.values(), sources, strict=True)]
    slots = [int(slot) for slot in (range(size) if slots is None else slots)]
    return RowSet(dict(zip(parts, sources, strict=True)), turns, size, slots, windows, step, whole)


def _sizes(parts: Mapping[str, Part], batch_size: int) -> dict[str, int]:
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}; expected 1 or more")
    weights = {}
    for source, part in parts.items():
        weights[part.rows] = weights.get(part.rows, 0) + fraction(value_at(_points(source, part), 0))
    total = sum(weights.values())
    if not all(weights.values()):
        name = next(name for name, weight in weights.items() if not weight)
        raise UserError(f"the row set `{name}` has the weight 0 at the first step, which would give it no rows")
    step = math.lcm(*((weight / total).denominator for weight in weights.values()))
    for name, weight in weights.items():
        if batch_size % step:
            raise UserError(
                f"batch_size={batch_size} gives the row set `{name}` {float(batch_size * weight / total):g} rows, by "
                f"its weight {float(weight):g} of {float(total):g}; batch_size={-(-batch_size // step) * step} works, "
                f"as any multiple of {step}"
            )
    return {name: int(batch_size * weight / total) for name, weight in weights.items()}


def _points(name: str, part: Part) -> Points:
    return points_of(part.weight, f"config.data.sources.{name}.weight")


def _open(name: str, part: Part, seed: int, tokenizer: Any, max_patches: int | None) -> Examples:
    """The examples of a part; in a mixture, each has an order and draws of its own, and keys with its name."""
    given = ("uri", "ops", "split", "where", "index", "limit", "reinforced")
    own = {name: getattr(part, name) for name in given} | dict(tokenizer=tokenizer, max_patches=max_patches)
    if not name:
        return open_examples(**own, seed=seed)
    mixed = int(np.random.SeedSequence((seed, zlib.crc32(name.encode()))).generate_state(1)[0])
    examples = open_examples(**own, seed=mixed, name=f"{name}/")
    if not examples.pipeline.keeps:
        raise UserError(
            f"config.data.sources.{name}.ops should end with keep('image', 'token_ids', ...), a row's fields"
        )
    return examples


def _windows(name: str, part: Part, examples: Examples) -> orders.Windows | None:
    where = f"config.data.sources.{name}" if name else "config.data"
    windows = orders.windows_of(part.order, examples.source.remote, where)
    if windows and examples.source.remote:
        mixed, shown = windows.block * windows.window * windows.lanes, dataclasses.asdict(windows)
        if part.order is None:
            log.warning("%s is in a store, so order=%r: %d examples are mixed at a time", part.uri, shown, mixed)
        examples.source.warn_of_window(mixed)
    return windows


class RowSet:
    """Rows of a batch, filled by one or several sources.

    Every epoch of a source has its own order. A single source drops the last partial batch of an epoch, so that no
    batch holds an example twice; in a mixture, a batch may, where an epoch of a source ends. Rows are found by their
    positions in the stream of all batches' rows.

    Args:
      sources: name -> examples.
      turns: how many turns each source has.
      size: number of rows of a batch over all processes.
      slots: numbers of the rows that this process reads.
      windows: of each source's order, None for a full one.
      step: rows of a batch on average, if batches differ in size.
      whole: an epoch of a single source is a multiple of this number, if the source has so many examples.
    """

    def __init__(
        self,
        sources: Mapping[str, Examples],
        turns: Turns,
        size: int,
        slots: Sequence[int],
        windows: Sequence[orders.Windows | None],
        step: int,
        whole: int,
    ):
        self.windows, self.announced = windows, set()
        self.shares = [max(1, turns.most(i, step)) for i in range(len(sources))]  # rows of a batch, about
        self.sources, self.turns, self.size, self.slots = list(sources.values()), turns, size, slots
        self.names = list(sources)
        dropped = whole if len(sources) == 1 and whole <= len(self.sources[0]) else 1
        self.lengths = [len(examples) // dropped * dropped for examples in self.sources]

    def read(self, first: int, bad: list[BadRecord]) -> Batch:
        """Returns this process's rows of the batch that begins at a position; appends bad examples to `bad`."""
        if any(examples.source.remote for examples in self.sources):
            self._announce(first)
        return self.sources[0].collate([self._row(first + slot, bad) for slot in self.slots])

    def _drawn(self, position: int) -> tuple[int, int]:
        """Returns the source of a position, and which of the source's draws it is."""
        draws, after = self.turns(position), self.turns(position + 1)
        source = next(i for i in range(len(draws)) if after[i] > draws[i])
        return source, draws[source]

    def _order(self, source: int, epoch: int) -> Sequence[int]:
        examples, windows = self.sources[source], self.windows[source]
        if windows is None:
            return orders.full(examples.seed, epoch, len(examples))
        return orders.windowed(examples.seed, epoch, len(examples), self.shares[source], windows)

    def _announce(self, first: int) -> None:
        """Tells sources in a store which examples a batch takes, and block by block what the next windows hold."""
        soon: dict[int, list[int]] = {}
        for slot in self.slots:
            source, draw = self._drawn(first + slot)
            epoch, at = divmod(draw, self.lengths[source])
            order = self._order(source, epoch)
            soon.setdefault(source, []).append(int(order[at]))
            if isinstance(order, orders.Windowed):
                lane, window, place = order.place(at)
                block = source, epoch, lane, window, place // order.block
                if block not in self.announced:
                    self.announced = self.announced if len(self.announced) < ANNOUNCED else set()
                    self.announced.add(block)
                    following = order.block_of(lane, window + 1, block[-1])
                    if following is None:
                        following = self._order(source, epoch + 1).block_of(lane, 0, block[-1])
                    for numbers in following or ():
                        self.sources[source].soon(numbers)
        for source, numbers in soon.items():
            self.sources[source].soon(numbers, next_=True)

    def _row(self, position: int, bad: list[BadRecord]) -> dict[str, Any]:
        source, draw = self._drawn(position)
        examples = self.sources[source]
        epoch, at = divmod(draw, self.lengths[source])
        order, n = self._order(source, epoch), len(examples)
        # Substitutes come from the next batches: the records of this batch are already used.
        first = int(order[at])
        following = (i for t in range(n) if (i := int(order[(at + self.size + t) % n])) != first)
        return examples.row_or_next(first, itertools.islice(following, min(SUBSTITUTES, n) - 1), draw, bad)

    def epochs(self, position: int) -> int:
        """Returns how many epochs of its sources the rows before a position have begun, all together."""
        draws = self.turns(position)
        return sum(-(-draw // length) for draw, length in zip(draws, self.lengths, strict=True))

    def counts(self, position: int) -> dict[str, tuple[int, float]]:
        """Returns name of a source -> (examples, epochs) that the rows before a position have taken of it."""
        draws = zip(self.names, self.turns(position), self.lengths, strict=True)
        return {name: (draw, draw / length) for name, draw, length in draws}

    def one(self) -> Batch:
        """Returns a batch of one example.

        Raises:
          UserError: the sources' fields, shapes or dtypes differ.
        """
        batches = []
        for examples in self.sources:
            row = examples.row_or_next(0, range(1, min(SUBSTITUTES, len(examples))), 0, [])
            batches.append(examples.collate([row]))
        first, *others = (
            {key: f"{x.dtype}{list(x.shape[1:])}" for key, x in config.flatten(b).items()} for b in batches
        )
        for name, other in zip(self.names[1:], others, strict=True):
            differ = [key for key in first | other if first.get(key) != other.get(key)]
            if differ:
                shown = (f"`{key}`: {first.get(key, 'none')} and {other.get(key, 'none')}" for key in differ)
                raise UserError(
                    f"the sources `{self.names[0]}` and `{name}` fill the same rows and differ in {', '.join(shown)}; "
                    "their ops must keep the same fields with the same shapes"
                )
        for key in first:
            self._check_labels(key)
        return batches[0]

    def _check_labels(self, key: str) -> None:
        """Raises a UserError if a number under `key` has one name in a source and another name in another source."""
        own = [(name, source.source.label_names(key)) for name, source in zip(self.names, self.sources, strict=True)]
        own = [(name, names) for name, names in own if names]
        for name, names in own[1:]:
            label = next((label for label, text in own[0][1].items() if names.get(label, text) != text), None)
            if label is not None:
                raise UserError(
                    f"the sources `{own[0][0]}` and `{name}` fill the same rows and number `{key}` differently: "
                    f"{label} is `{own[0][1][label]}` and `{names[label]}`; give both the same folders, or leave "
                    f"`{key}` out of their ops"
                )
