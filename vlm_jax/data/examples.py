"""Examples of a source by number, what happens to bad ones, and batches of them."""

import copy
import functools
import itertools
import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlm_jax import config
from vlm_jax.data import index as index_lib
from vlm_jax.data import ops as ops_lib
from vlm_jax.data.confined import digest
from vlm_jax.data.ops import Pipeline
from vlm_jax.data.reinforced import Reinforced
from vlm_jax.data.rows import Batch, Fields, check, fields_of, stack
from vlm_jax.data.source import BadExample, Source, check_field, select
from vlm_jax.data.sources import open_source
from vlm_jax.errors import CUT, DataError, StoreError, UserError

log = logging.getLogger(__name__)
# Number of records tried in place of a bad one before an error is raised.
SUBSTITUTES = 100
# Number of examples that decide which fields an example has.
DECIDING = 9


class BadRecord(NamedTuple):
    """An example that cannot be used: its key, why, and the kind of the fault, see `BadExample`."""

    key: str
    reason: str
    kind: str


_thread = threading.local()


def generator(seed: int, draw: int) -> np.random.Generator:
    """Returns `Generator(Philox(key=(seed, draw)))`.

    Each thread re-keys one object, in a tenth of the time that a new object takes.
    """
    if not hasattr(_thread, "rng"):
        _thread.rng = np.random.Generator(np.random.Philox(key=0))
        _thread.state = _thread.rng.bit_generator.state
    _thread.state["state"]["key"][:] = seed, draw
    _thread.rng.bit_generator.state = _thread.state
    return _thread.rng


class Memory(dict[int, dict[str, Any] | BadExample]):
    """The results of the ops before `cache`; a copy in another process is empty."""

    def __reduce__(self):
        return Memory, ()


class Examples:
    """Examples by number; remembers the results of the ops before `cache`.

    Args:
      source: the records.
      pipeline: makes an example of a record.
      chosen: int [n], the examples' record numbers; None for all records in order.
      seed: of the ops' randomness.
      weight: float [n], the field `weight` of the records; None leaves them as they are.
      name: stands before the keys of records.
      uri: the source's, for messages.
      left_out: what is no example, by reason, see `Source.left_out`.
      reinforced: views of which one is drawn, with what teachers say of it; None draws anew every time.
    """

    def __init__(
        self,
        source: Source,
        pipeline: Pipeline,
        chosen: np.ndarray | None,
        seed: int,
        weight: np.ndarray | None = None,
        name: str = "",
        uri: str = "",
        left_out: Mapping[str, int] | None = None,
        reinforced: Reinforced | None = None,
    ):
        self.source, self.pipeline, self.chosen, self.seed = source, pipeline, chosen, seed
        self.weight, self.name, self.uri, self.left_out = weight, name, uri, left_out or {}
        self.reinforced = reinforced
        self.memory: Memory = Memory()

    def __len__(self) -> int:
        return len(self.source) if self.chosen is None else len(self.chosen)

    def through(self, pipeline: Pipeline) -> "Examples":
        """Returns the same examples through other ops; what is remembered is shared, if the ops before `cache` are."""
        other = copy.copy(self)
        other.__dict__.pop("fields", None)
        other.pipeline = pipeline
        other.memory = self.memory if pipeline.before == self.pipeline.before else Memory()
        return other

    def _number(self, i: int) -> int:
        return i if self.chosen is None else int(self.chosen[i])

    def key(self, i: int) -> str:
        return self.name + self.source.key(self._number(i))

    def _record(self, i: int) -> dict[str, Any]:
        record = self.source[self._number(i)]
        return record if self.weight is None else record | {"weight": float(self.weight[i])}

    def _prepared(self, i: int) -> dict[str, Any]:
        if not self.pipeline.cached:
            return self.pipeline.prepare(self._record(i))
        if i not in self.memory:
            try:
                self.memory[i] = self.pipeline.prepare(self._record(i))
            except BadExample as error:
                self.memory[i] = BadExample(*error.args)  # without the traceback, which holds pictures
        if isinstance(self.memory[i], BadExample):
            raise BadExample(*self.memory[i].args)
        return self.memory[i]

    def soon(self, numbers: Iterable[int], next_: bool = False) -> None:
        """Tells the source which examples will be read, see `Source.soon`."""
        if self.source.remote:
            self.source.soon(numbers if self.chosen is None else [self._number(i) for i in numbers], next_)

    def read(self, i: int, draw: int) -> dict[str, Any]:
        """Returns example `i` with the randomness of draw number `draw`.

        Raises:
          BadExample: anything is wrong with the record, an exception that nothing foresaw included.
          StoreError: the store cannot be used; no record is at fault.
          DataError: the ops do not suit the data; no record is at fault.
        """
        try:
            return self._finished(i, draw)
        except (BadExample, DataError, StoreError):
            raise
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of Rust: a tokenizer's
                raise
            kind = "ops" if isinstance(error, UserError) else type(error).__name__
            reason = " ".join(str(error).split())[:CUT]
            raise BadExample(reason if kind == "ops" else f"{kind}: {reason}", kind) from error

    def _finished(self, i: int, draw: int) -> dict[str, Any]:
        rng = generator(self.seed, draw)
        if self.reinforced is None:
            return self.pipeline.finish(self._prepared(i), rng)
        view = self._number(i) * self.reinforced.views + int(rng.integers(self.reinforced.views))
        example = self.pipeline.finish(self._prepared(i), generator(self.reinforced.seed, view))
        return example | self.reinforced[view]

    def row(self, i: int, draw: int) -> dict[str, Any]:
        """Returns example `i` with the fields of other examples; raises BadExample. See `read`."""
        row = self.read(i, draw)
        check(row, self.fields)
        return row

    @functools.cached_property
    def fields(self) -> Fields:
        """The fields of the first good examples."""
        rows, bad = [], []
        for i in range(min(SUBSTITUTES, len(self))):
            try:
                rows.append(self.read(i, 0))
            except BadExample as error:
                bad.append(self.bad_record(i, error))
            if len(rows) == DECIDING:
                break
        if not rows:
            raise _all_bad(bad)
        return fields_of(rows, self.pipeline.keeps)

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Stacks rows into a batch."""
        return stack(rows, self.fields)

    def bad_record(self, i: int, error: BadExample) -> BadRecord:
        """Returns what is said and counted of a bad example."""
        printable = lambda text: text.encode("utf-8", "backslashreplace").decode()
        return BadRecord(printable(self.key(i)), printable(error.reason), error.kind)

    def row_or_next(self, i: int, following: Iterable[int], draw: int, bad: list[BadRecord]) -> dict[str, Any]:
        """Returns row `i`, or the first good one of `following`; appends the bad ones to `bad`."""
        before = len(bad)
        for j in itertools.chain((i,), following):
            try:
                return self.row(j, draw)
            except BadExample as error:
                bad.append(self.bad_record(j, error))
                cause = error.__cause__
        raise _all_bad(bad[before:]) from cause

    def fingerprint(self) -> str:
        """Returns a short hash that changes with the records and with the choice among these."""
        chosen, weight = (b"" if x is None else x.tobytes() for x in (self.chosen, self.weight))
        views = [] if self.reinforced is None else [self.reinforced.fingerprint().encode()]
        return digest(self.source.fingerprint().encode(), chosen, weight, *views)


def _all_bad(bad: Sequence[BadRecord]) -> UserError:
    return UserError(f"{len(bad)} examples in a row are bad; the last is {bad[-1].key}: {bad[-1].reason}")


def open_examples(
    *,
    uri: str,
    ops: str,
    split: str | None,
    where: Mapping[str, Iterable[Any]] | None,
    index: str | None = None,
    limit: int | None = None,
    reinforced: str | None = None,
    tokenizer: Any,
    seed: int,
    name: str = "",
    max_patches: int | None = None,
) -> Examples:
    """Opens the examples of a source; arguments as of `loader.train_loader`, `Examples` and `ops.parse`."""
    pipeline = ops_lib.parse(ops, tokenizer, max_patches)
    source = open_source(uri, split)
    chosen, weight = (None, None) if index is None else index_lib.read(index, len(source), uri)
    left_out = dict(source.left_out)
    if where:
        unusable = []
        selected = select(source, where, unusable)
        if not len(selected):
            for path in where:
                check_field(source, path, f"data set `{uri}`")
        if unusable:
            left_out[f"without a usable {' or '.join(where)}"] = len(unusable)
        if index is None:
            chosen = selected
        else:
            keep = np.isin(chosen, selected)
            chosen, weight = chosen[keep], weight[keep]
    if limit is not None:
        config.check_least(1, "config.data", limit=limit)
        chosen = np.arange(len(source)) if chosen is None else chosen
        kept = np.sort(np.random.default_rng(seed).permutation(len(chosen))[:limit])
        chosen, weight = chosen[kept], None if weight is None else weight[kept]
    for what, count in left_out.items():
        log.warning("%s: left out %d %s", uri, count, what)
    views = reinforced and Reinforced(reinforced, uri, split, ops, len(source), source.fingerprint())
    source = source.narrow(pipeline.paths) if pipeline.paths else source
    return Examples(source, pipeline, chosen, seed, weight, name, uri, left_out, views)


def log_bad(bad: list[BadRecord]) -> None:
    """Logs one line for each bad example."""
    for key, reason, _ in bad:
        log.warning("bad example %s: %s", key, reason)


def check_bad(count: int, allowed: float, read: int, max_bad_fraction: float, bad: list[BadRecord]) -> None:
    """Raises UserError if more than `allowed` examples are bad."""
    if count > allowed:
        raise UserError(
            f"{count} of {read} examples read are bad, more than max_bad_fraction={max_bad_fraction:g}; "
            f"the last is {bad[-1].key}: {bad[-1].reason}"
        )
