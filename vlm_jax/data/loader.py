"""Batches for training and evaluation: a shuffled, infinite, resumable stream, and one pass in order.

The unit of work is the batch: batch k is a pure function of (configuration, seed, k), so that threads or
worker processes may compute batches in any order, and the position to resume from is k itself. Each process of a run
reads its rows of batch k: the batch is the same for any number of processes.
"""

import contextlib
import functools
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from vlm_jax.data import background
from vlm_jax.data import ops as ops_lib
from vlm_jax.data.examples import SUBSTITUTES, BadRecord, Batch, Examples, check_bad, collate, log_bad
from vlm_jax.data.source import BadExample, select
from vlm_jax.data.sources import open_source
from vlm_jax.errors import UserError

# The share of bad examples is taken of at least this many reads (or of the data set, where that is smaller): a share
# of the first few reads says little.
ENOUGH_READS = 10_000


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, n: int) -> Sequence[int]:
    """A permutation of range(n) for an epoch: in memory up to 8 MB, beyond that computed index by index."""
    if n <= 2**20:
        return np.random.default_rng((seed, epoch)).permutation(n)
    # A cipher over the indices, no memory; on small ranges it walks long cycles (2 ms an index at n=40).
    return grain.MapDataset.range(n).shuffle(seed=(seed * 1_000_003 + epoch) % 2**32)


class TrainBatches:
    """(batch, bad examples) by batch number; every epoch has its own order, and drops its last partial batch."""

    def __init__(self, examples: Examples, batch_size: int, slots: Sequence[int]):
        self.examples, self.batch_size, self.n = examples, batch_size, len(examples)
        self.slots = slots
        self.start = 0

    def __len__(self) -> int:
        return sys.maxsize // 2

    def __getitem__(self, k: int) -> tuple[Batch, list[BadRecord]]:
        k += self.start
        epoch, within = divmod(k, self.n // self.batch_size)
        order = epoch_order(self.examples.seed, epoch, self.n)
        rows, bad = [], []
        for slot in self.slots:
            at, draw = within * self.batch_size + slot, k * self.batch_size + slot
            # Substitutes come from the next batch on: the records of this one are in it already.
            following = (int(order[(at + self.batch_size + t) % self.n]) for t in range(min(SUBSTITUTES, self.n) - 1))
            rows.append(self.examples.read_or_next(int(order[at]), following, draw, bad))
        return collate(rows, self.examples.pipeline.keeps), bad

    def one(self) -> Batch:
        """A batch of one example."""
        row = self.examples.read_or_next(0, range(1, min(SUBSTITUTES, self.n)), 0, [])
        return collate([row], self.examples.pipeline.keeps)


class Loader(Iterator[Batch]):
    """Iterator over this process's share of the training batches; made by `train_loader`.

    Attributes:
      example: a batch of one example, for its fields, shapes and dtypes.
      num_examples: examples of the data set.
      rows: of each batch that this process reads.
      batches_per_epoch: whole batches of an epoch; the rest of the epoch is dropped.
      read, bad: examples of this process read so far, and how many of them were bad (counts survive resuming).
      wait_seconds: time spent waiting in `next`.
    """

    def __init__(self, batches: TrainBatches, *, workers: int, threads: int, max_bad_fraction: float):
        self._batches, self._workers, self._threads = batches, workers, threads
        self._max_bad_fraction = max_bad_fraction
        self._iterator = None
        self._k = 0
        self.read = self.bad = 0
        self.wait_seconds = 0.0
        self.num_examples, self.rows = batches.n, batches.slots
        self.batches_per_epoch = batches.n // batches.batch_size

    @functools.cached_property
    def example(self) -> Batch:
        return self._batches.one()

    def start(self) -> None:
        """Starts to prefetch now, not at the first `next`."""
        if self._iterator is None:
            self._batches.start = self._k
            self._iterator = background.Ahead(self._batches, workers=self._workers, threads=self._threads)

    def __next__(self) -> Batch:
        begin = time.perf_counter()
        self.start()
        batch, bad = next(self._iterator)
        self.wait_seconds += time.perf_counter() - begin
        self._k += 1
        self.read += len(self._batches.slots) + len(bad)
        self.bad += len(bad)
        if bad:
            self._check(bad)
        return batch

    def _check(self, bad: list[BadRecord]) -> None:
        log_bad(bad)
        epochs = -(-self._k // self.batches_per_epoch)
        allowed = self._max_bad_fraction * max(self.read, min(self.num_examples, ENOUGH_READS))
        if self._max_bad_fraction > 0:
            allowed = max(allowed, epochs)  # one bad record of a small data set comes again in every epoch
        check_bad(self.bad, allowed, self.read, self._max_bad_fraction, bad)

    def get_state(self) -> dict[str, int]:
        """The position after the last batch returned, JSON-able."""
        return {
            "batch": self._k,
            "read": self.read,
            "bad": self.bad,
            "batch_size": self._batches.batch_size,
            "num_examples": self.num_examples,
            "seed": self._batches.examples.seed,
        }

    def set_state(self, state: Mapping[str, int]) -> None:
        """Goes to a position that `get_state` returned: the next batch is the one after it.

        Raises:
          UserError: the position belongs to other data, another batch size or another seed.
        """
        here = self.get_state()
        for name in ("batch_size", "num_examples", "seed"):
            if state[name] != here[name]:
                raise UserError(
                    f"the saved data position has {name}={state[name]}, this run has {here[name]}; "
                    "continue with the same data, or start in a new workdir"
                )
        self.close()
        self._k, self.read, self.bad = state["batch"], state["read"], state["bad"]

    def close(self) -> None:
        """Ends threads and worker processes; a further `next` starts them again."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None


def train_loader(
    *,
    uri: str,
    ops: str,
    batch_size: int,
    split: str | None = None,
    seed: int = 0,
    tokenizer: Any = None,
    where: Mapping[str, Iterable[Any]] | None = None,
    workers: int = 0,
    threads: int = 1,
    max_bad_fraction: float = 0.001,
    rows: Sequence[int] | None = None,
) -> Loader:
    """Shuffled, infinite batches of a data set; every process gets its rows of each batch.

    Args:
      uri: the source, see `sources.open_source`.
      ops: the op string, see `ops.parse`; without `keep`, numbers and arrays of the example make the batch.
      batch_size: examples of the batch over all processes.
      split: the source's split.
      seed: fixes order and augmentation.
      tokenizer: for `tokenize`.
      where: keeps the records whose field (path) is among the values: `{"style": ("twemoji", "fluent")}`.
      workers: processes that compute batches; 0 computes them in threads of this process.
      threads: threads that compute batches, in this process or in each worker.
      max_bad_fraction: share of examples that may be bad (counted, logged and replaced); beyond it UserError.
      rows: of each batch that this process reads, see `sharding.rows_of_process`; None: all.

    Raises:
      UserError: the batch is larger than the data set.
    """
    examples = _examples(uri, split, ops, tokenizer, where, seed)
    if len(examples) < batch_size:
        chosen = f" after where={dict(where)}" if where else ""
        raise UserError(f"data set `{uri}` has {len(examples)} examples{chosen}, fewer than batch_size={batch_size}")
    batches = TrainBatches(examples, batch_size, _slots(batch_size, rows))
    return Loader(batches, workers=workers, threads=threads, max_bad_fraction=max_bad_fraction)


def _examples(uri, split, ops, tokenizer, where, seed) -> Examples:
    pipeline = ops_lib.parse(ops, tokenizer)
    source = open_source(uri, split)
    chosen = select(source, where) if where else None
    return Examples(source.narrow(pipeline.paths) if pipeline.paths else source, pipeline, chosen, seed)


def _slots(batch_size: int, rows: Sequence[int] | None) -> Sequence[int]:
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}; expected 1 or more")
    return range(batch_size) if rows is None else [int(row) for row in rows]


class EvalBatches:
    """One pass in order: see `eval_batches`. `len()` is the number of batches."""

    def __init__(
        self, examples: Examples, batch_size: int, slots: Sequence[int], threads: int, max_bad_fraction: float
    ):
        self.examples, self.batch_size, self.threads = examples, batch_size, threads
        self.slots = slots
        self.max_bad_fraction = max_bad_fraction
        self.num_examples = len(examples)

    def __len__(self) -> int:
        return -(-self.num_examples // self.batch_size)

    def __getitem__(self, k: int) -> tuple[Batch, list[BadRecord]]:
        rows, bad = [], []
        for i in (k * self.batch_size + slot for slot in self.slots):
            try:
                rows.append(self.examples.read(i, i) if i < self.num_examples else None)
            except BadExample as error:
                rows.append(None)
                bad.append((self.examples.key(i), str(error)))
        mask = np.array([row is not None for row in rows])
        # Rows that are no examples repeat one, for its shape; any good example does where the batch has none.
        filler = next((row for row in rows if row is not None), None)
        if filler is None:
            tries = range(min(SUBSTITUTES, self.num_examples))
            filler = self.examples.read_or_next(tries[0], tries[1:], 0, [])
        batch = collate([filler if row is None else row for row in rows], self.examples.pipeline.keeps)
        return batch | {"mask": mask}, bad

    def __iter__(self) -> Iterator[Batch]:
        total = 0
        with contextlib.closing(background.Ahead(self, workers=0, threads=self.threads)) as batches:
            for batch, bad in batches:
                total += len(bad)
                if bad:
                    log_bad(bad)
                    allowed = max(self.max_bad_fraction * self.num_examples, self.max_bad_fraction > 0)
                    check_bad(total, allowed, self.num_examples, self.max_bad_fraction, bad)
                yield batch


def eval_batches(
    *,
    uri: str,
    ops: str,
    batch_size: int,
    split: str | None = None,
    tokenizer: Any = None,
    where: Mapping[str, Iterable[Any]] | None = None,
    seed: int = 0,
    threads: int = 1,
    max_bad_fraction: float = 0.001,
    rows: Sequence[int] | None = None,
) -> EvalBatches:
    """One pass in the source's order, in batches of one size, with `mask` (bool [B]) of the rows that are examples.

    Rows beyond the last example, and bad examples, are masked. All processes get as many batches, each its rows of
    them. Arguments as in `train_loader`; can be iterated again.
    """
    examples = _examples(uri, split, ops, tokenizer, where, seed)
    if not len(examples):
        chosen = f" with where={dict(where)}" if where else ""
        raise UserError(f"data set `{uri}`, split `{split}`, has no examples{chosen}")
    return EvalBatches(examples, batch_size, _slots(batch_size, rows), threads, max_bad_fraction)
