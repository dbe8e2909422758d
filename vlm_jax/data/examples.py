"""Examples of a source by number, what happens to bad ones, and batches of them."""

import itertools
import logging
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from vlm_jax.data import index as index_lib
from vlm_jax.data import ops as ops_lib
from vlm_jax.data.ops import Pipeline
from vlm_jax.data.source import BadExample, Source, select
from vlm_jax.data.sources import open_source
from vlm_jax.errors import UserError

log = logging.getLogger(__name__)
Batch = dict[str, np.ndarray]
BadRecord = tuple[str, str]  # key, reason
# bool before int: a bool is an int.
DTYPES = {bool | np.bool_: bool, int | np.integer: np.int32, float | np.floating: np.float32}
# Number of records tried in place of a bad one before an error is raised.
SUBSTITUTES = 100


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


class Examples:
    """Examples by number; remembers the results of the ops before `cache`.

    Args:
      source: the records.
      pipeline: makes an example of a record.
      chosen: int [n], the examples' record numbers; None for all records in order.
      seed: of the ops' randomness.
      weight: float [n], the field `weight` of the records; None leaves them as they are.
      name: stands before the keys of records.
    """

    def __init__(
        self,
        source: Source,
        pipeline: Pipeline,
        chosen: np.ndarray | None,
        seed: int,
        weight: np.ndarray | None = None,
        name: str = "",
    ):
        self.source, self.pipeline, self.chosen, self.seed = source, pipeline, chosen, seed
        self.weight, self.name = weight, name
        self.memory: dict[int, dict[str, Any] | str] = {}

    def __len__(self) -> int:
        return len(self.source) if self.chosen is None else len(self.chosen)

    def __getstate__(self):
        return self.__dict__ | {"memory": {}}

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
                self.memory[i] = str(error)
        if isinstance(self.memory[i], str):
            raise BadExample(self.memory[i])
        return self.memory[i]

    def read(self, i: int, draw: int) -> dict[str, Any]:
        """Returns example `i` with the randomness of draw number `draw`; raises BadExample."""
        return self.pipeline.finish(self._prepared(i), generator(self.seed, draw))

    def read_or_next(self, i: int, following: Iterable[int], draw: int, bad: list[BadRecord]) -> dict[str, Any]:
        """Returns example `i`, or the first good one of `following`; appends (key, reason) of bad ones to `bad`."""
        before = len(bad)
        for j in itertools.chain((i,), following):
            try:
                return self.read(j, draw)
            except BadExample as error:
                bad.append((self.key(j), str(error)))
        raise UserError(f"{len(bad) - before} examples in a row are bad; the last is {bad[-1][0]}: {bad[-1][1]}")


def open_examples(
    *,
    uri: str,
    ops: str,
    split: str | None,
    where: Mapping[str, Iterable[Any]] | None,
    index: str | None = None,
    tokenizer: Any,
    seed: int,
    name: str = "",
) -> Examples:
    """Opens the examples of a source; arguments as of `loader.train_loader` and `Examples`."""
    pipeline = ops_lib.parse(ops, tokenizer)
    source = open_source(uri, split)
    chosen, weight = (None, None) if index is None else index_lib.read(index, len(source), uri)
    if where:
        selected = select(source, where)
        if index is None:
            chosen = selected
        else:
            keep = np.isin(chosen, selected)
            chosen, weight = chosen[keep], weight[keep]
    return Examples(source.narrow(pipeline.paths) if pipeline.paths else source, pipeline, chosen, seed, weight, name)


def log_bad(bad: list[BadRecord]) -> None:
    """Logs one line for each bad example."""
    for key, reason in bad:
        log.warning("bad example %s: %s", key, reason)


def check_bad(count: int, allowed: float, read: int, max_bad_fraction: float, bad: list[BadRecord]) -> None:
    """Raises UserError if more than `allowed` examples are bad."""
    if count > allowed:
        raise UserError(
            f"{count} of {read} examples read are bad, more than max_bad_fraction={max_bad_fraction:g}; "
            f"the last is {bad[-1][0]}: {bad[-1][1]}"
        )


def collate(rows: list[dict[str, Any]], texts: bool = False) -> Batch:
    """Stacks examples: arrays to [B, ...], int to int32, float to float32, bool.

    With `texts`, str and lists become object arrays [B]. A dict of arrays is stacked too. Other fields are left out.

    Raises:
      UserError: a field's shape differs between examples, or some examples lack the field.
    """
    batch = {}
    for key, first in rows[0].items():
        try:
            values = [row[key] for row in rows]
        except KeyError:
            raise UserError(f"some examples lack the field `{key}`; choose fields with `keep(...)`") from None
        if isinstance(first, dict) and first and all(isinstance(v, np.ndarray) for v in first.values()):
            batch[key] = collate(values)
        elif isinstance(first, np.ndarray):
            try:
                batch[key] = np.stack(values)
            except ValueError:
                shapes = sorted({np.shape(v) for v in values})
                raise UserError(f"`{key}` has shapes {shapes[:3]}; the ops must give one shape (resize, pad)") from None
        elif isinstance(first, bool | int | float | np.number | np.bool_):
            batch[key] = np.asarray(values, next(d for t, d in DTYPES.items() if isinstance(first, t)))
        elif texts and isinstance(first, str | list | tuple):
            batch[key] = np.empty(len(values), object)
            batch[key][:] = values
    return batch
