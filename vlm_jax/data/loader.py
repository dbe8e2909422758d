"""Batches for training and evaluation: a shuffled, infinite, resumable stream, and one pass in order.

The unit of work is the batch: batch k is a pure function of (configuration, seed, k), so that threads or
worker processes may compute batches in any order, and the position to resume from is k itself. Each process of a run
reads its rows of batch k: the batch is the same for any number of processes.
"""

import collections
import contextlib
import functools
import itertools
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax import config
from vlm_jax.data import background, mixture, remote
from vlm_jax.data.examples import SUBSTITUTES, BadRecord, Examples, check_bad, log_bad, open_examples
from vlm_jax.data.mixture import RowSet
from vlm_jax.data.naflex import Buckets, check_example
from vlm_jax.data.naflex import read as read_buckets
from vlm_jax.data.rows import Batch
from vlm_jax.data.source import BadExample
from vlm_jax.errors import UserError

log = logging.getLogger(__name__)
# The share of bad examples is computed over at least this many reads (or over a smaller data set): the share of the
# first few reads says little.
ENOUGH_READS = 10_000
TOLD = 60.0  # seconds between two lines on repeated requests


class TrainBatches:
    """(batch, bad examples, requests that were made again, see `remote.Counts`) by batch number.

    A batch is a dict of arrays if its only row set is "batch", else a dict of row sets: `{row set: {field: array}}`.

    Args:
      sets: length of `data.naflex` -> row sets by name; {None: row sets} without lengths.
      seed: of the lengths' draws.
      buckets: the lengths, or None.
    """

    def __init__(self, sets: Mapping[int | None, Mapping[str, RowSet]], seed: int, buckets: Buckets | None = None):
        self.sets, self.seed, self.buckets = sets, seed, buckets
        self.start = 0
        self.sizes, self.slots = self._all("size"), self._all("slots")

    def __len__(self) -> int:
        return sys.maxsize // 2

    def __getitem__(self, k: int) -> tuple[Batch, list[BadRecord], dict[str, float]]:
        k, bad = self.start + int(k), []
        own = self.sets[self.length(k)]
        batch = self._shaped({name: rows.read(self.first(k, rows), bad) for name, rows in own.items()})
        return batch, bad, remote.counts.take()

    def length(self, k: int) -> int | None:
        """Returns the length of batch k."""
        return None if self.buckets is None else self.buckets.length(self.seed, k)

    def first(self, k: int, rows: RowSet) -> int:
        """Returns the position of batch k's first row in a row set."""
        return k * rows.size if self.buckets is None else self.buckets.before(self.seed, k)

    def one(self, length: int | None) -> Batch:
        """Returns a batch of one example in each row set."""
        found = self._shaped({name: rows.one() for name, rows in self.sets[length].items()})
        if length is not None:
            check_example(length, found)
        return found

    def _all(self, field: str) -> dict[int | None, Any]:
        of = lambda sets: self._shaped({name: getattr(rows, field) for name, rows in sets.items()})
        return {length: of(sets) for length, sets in self.sets.items()}

    def _shaped(self, by_set: dict[str, Any]) -> Any:
        return by_set["batch"] if list(by_set) == ["batch"] else by_set


class Loader(Iterator[Batch]):
    """Iterator over this process's share of the training batches; made by `train_loader`.

    Attributes:
      examples: length -> a batch of one example, for its fields, shapes and dtypes. Lengths are those of
        `data.naflex`; without it, the only length is None.
      example: that of the first length.
      lengths: of `data.naflex`, or (None,).
      length: of the last batch.
      batch_size: rows of a batch over all processes, of all row sets together; of several lengths, a list.
      num_examples: examples of the data set, the length of an epoch. An epoch of a mixture is as many examples as its
        sources have together: each once, if the weights are as the sources' sizes.
      sizes: rows of a batch over all processes; of several row sets, {row set: rows}; of several lengths, {length:
        rows}. `size_of(length)` has those of one length.
      rows: numbers of the rows that this process reads of each batch; in the form of `sizes`.
      first_row: the first of these numbers; processes with the same first row read the same rows.
      batches_per_epoch: whole batches of an epoch; a single source drops the rest of the epoch.
      read, bad: examples of this process read so far, and how many of them were bad (counts survive resuming).
      kinds: the bad examples by kind, see `BadExample`.
      left_out: what the data sets' files hold beside examples, by reason, see `Source.left_out`.
      teachers: name -> spec of the teachers whose embeddings the data has, see `Reinforced`.
      requests: requests to stores that were made again, and seconds waited for them, see `remote.Counts`; of this
        process and its workers, since it began.
      wait_seconds: time spent waiting in `next`.
    """

    def __init__(self, batches: TrainBatches, *, workers: int, threads: int, max_bad_fraction: float):
        self._batches, self._workers, self._threads = batches, workers, threads
        self._max_bad_fraction = max_bad_fraction
        self._iterator = None
        self._k, self.length = 0, None
        self.read = self.bad = 0
        self.kinds = collections.Counter()
        self.wait_seconds, self.requests, self._told = 0.0, collections.Counter(), -TOLD
        self.sizes, self.rows = (of.get(None, of) for of in (batches.sizes, batches.slots))
        sets = self._sets = list(next(iter(batches.sets.values())).values())
        self.first_row = sets[0].slots[0]
        self._examples = {name: one for rows in sets for name, one in zip(rows.names, rows.sources, strict=True)}
        self.num_examples = sum(map(len, self._examples.values()))
        self.left_out = sum(
            (collections.Counter(one.left_out) for one in self._examples.values()), collections.Counter()
        )
        reinforced = [one.reinforced for one in self._examples.values() if one.reinforced]
        self.teachers = {name: spec for own in reinforced for name, spec in own.teachers.items()}
        sizes = [sum(rows.size for rows in own.values()) for own in batches.sets.values()]
        self.lengths, self.batch_size = tuple(batches.sets), sizes[0] if len(sizes) == 1 else sizes
        self._share = {key: sum(len(rows.slots) for rows in own.values()) for key, own in batches.sets.items()}
        self.batches_per_epoch = len(sizes) * self.num_examples // sum(sizes)

    @functools.cached_property
    def fingerprints(self) -> dict[str, str]:
        """Name of a source (its URI, if it is the only one) -> short hash of its data, see `Source.fingerprint`."""
        return {name or one.uri: one.fingerprint() for name, one in self._examples.items()}

    @functools.cached_property
    def examples(self) -> dict[int | None, Batch]:
        return {length: self._batches.one(length) for length in self._batches.sets}

    @property
    def example(self) -> Batch:
        return next(iter(self.examples.values()))

    def size_of(self, length: int | None) -> int | dict[str, int]:
        return self._batches.sizes[length]

    def count(self, k: int) -> int:
        """Returns the number of examples in the first k batches."""
        return sum(self._batches.first(k, rows) for rows in self._sets)

    def start(self) -> None:
        """Starts to prefetch now, not at the first `next`."""
        if self._iterator is None:
            every = (rows for own in self._batches.sets.values() for rows in own.values()) if self._workers else ()
            for examples in itertools.chain.from_iterable(rows.sources for rows in every):
                _ = examples.fields  # once, and not in each worker
            self._batches.start = self._k
            self._iterator = background.Ahead(self._batches, workers=self._workers, threads=self._threads)

    def __next__(self) -> Batch:
        begin = time.perf_counter()
        self.start()
        batch, bad, requests = next(self._iterator)
        self.wait_seconds += time.perf_counter() - begin
        self.length = self._batches.length(self._k)
        self._k += 1
        self.read += self._share[self.length] + len(bad)
        if bad:
            self.bad += len(bad)
            self.kinds.update(record.kind for record in bad)
            self._check(bad)
        if requests:
            self._tell(requests)
        return batch

    def _tell(self, requests: Mapping[str, float]) -> None:
        self.requests.update(requests)
        if time.monotonic() - self._told >= TOLD:
            self._told = time.monotonic()
            log.warning(
                "requests to stores: %d were made again so far, after %.1f s of waiting",
                self.requests["repeated_requests"],
                self.requests["waited_seconds"],
            )

    def _check(self, bad: list[BadRecord]) -> None:
        log_bad(bad)
        epochs = sum(rows.epochs(self._batches.first(self._k, rows)) for rows in self._sets)
        allowed = self._max_bad_fraction * max(self.read, min(self.num_examples, ENOUGH_READS))
        if self._max_bad_fraction > 0:
            allowed = max(allowed, epochs)  # one bad record of a small data set comes again in every epoch
        check_bad(self.bad, allowed, self.read, self._max_bad_fraction, bad)

    def taken(self) -> dict[str, float]:
        """Returns, for the log, the examples and epochs that the batches so far took of each source of a mixture.

        And the length of the last batch, with `data.naflex`.
        """
        found = {}
        for rows in self._sets:
            for name, (examples, epochs) in rows.counts(self._batches.first(self._k, rows)).items():
                found |= {f"data/{name}/examples": examples, f"data/{name}/epochs": epochs} if name else {}
        return found if self.length is None else found | {"data/length": self.length}

    def get_state(self) -> dict[str, Any]:
        """Returns the position after the last returned batch, JSON-able."""
        return {
            "batch": self._k,
            "read": self.read,
            "bad": self.bad,
            "kinds": dict(self.kinds),
            "batch_size": self.batch_size,
            "num_examples": self.num_examples,
            "seed": self._batches.seed,
            "fingerprints": self.fingerprints,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues from a position that `get_state` returned, with the next batch.

        Raises:
          UserError: the position belongs to other or changed data, another batch size or another seed.
        """
        here = self.get_state()
        for name in ("batch_size", "num_examples", "seed"):
            if state[name] != here[name]:
                raise UserError(
                    f"the saved data position has {name}={state[name]}, this run has {here[name]}; "
                    "continue with the same data, or start in a new workdir"
                )
        for name, before in state.get("fingerprints", {}).items():  # earlier versions saved none
            if self.fingerprints.get(name) != before:
                raise UserError(
                    f"the data set `{name}` has changed since the data position was saved; restore it, or start in a "
                    "new workdir"
                )
        self.go_on(state)

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Continues with the batch number and the counts of another loader's position."""
        self.close()
        self._k, self.read, self.bad = state["batch"], state["read"], state["bad"]
        self.kinds = collections.Counter(state.get("kinds", {}))

    def close(self) -> None:
        """Ends threads and worker processes; a further `next` starts them again."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None


def train_loader(
    *,
    batch_size: int,
    uri: str | None = None,
    ops: str | None = None,
    split: str | None = None,
    seed: int = 0,
    tokenizer: Any = None,
    where: Mapping[str, Iterable[Any]] | None = None,
    index: str | None = None,
    limit: int | None = None,
    reinforced: str | None = None,
    order: str | Mapping[str, Any] | None = None,
    sources: Mapping[str, Mapping[str, Any]] | None = None,
    naflex: Mapping[str, Any] | None = None,
    workers: int = 0,
    threads: int = 1,
    max_bad_fraction: float = 0.001,
    rows: Sequence[int] | Mapping[Any, Sequence[int]] | None = None,
) -> Loader:
    """Returns shuffled, infinite batches of a data set or a mixture; every process gets its rows of each batch.

    Args:
      batch_size: examples of the batch over all processes, of all row sets together; not with `naflex`.
      uri: the source, see `sources.open_source`.
      ops: the op string, see `ops.parse`; without `keep`, a batch holds the numbers and arrays of its examples.
      split: the source's split.
      seed: fixes order and augmentation.
      tokenizer: for ops such as `tokenize`.
      where: field path -> accepted values; keeps the records that match: `{"style": ("twemoji", "fluent")}`.
      index: file that chooses examples by number, and may weight them (the field `weight`), see `index.read`.
      limit: keeps at most so many of these examples, drawn once by the seed: a memory of earlier data, for instance.
      reinforced: folder of views and what teachers say of them; each draw takes one of the views, see `Reinforced`.
      order: of an epoch's examples: "full", "windowed", or dict(name="windowed", block=..., window=..., lanes=...), see
        `order.Windows`; defaults to "windowed" for a source in a store, else to "full".
      sources: a mixture, name -> `mixture.Part`, in place of the eight arguments of one source.
      naflex: batches of packed pictures of several lengths, see `naflex.Buckets`.
      workers: processes that compute batches; 0 computes them in threads of this process.
      threads: threads that compute batches, in this process or in each worker.
      max_bad_fraction: allowed share of bad examples (counted, logged and replaced); a larger one raises UserError.
      rows: numbers of the rows that this process reads, see `sharding.rows_of_process`; of several row sets or lengths,
        {row set or length: numbers}. None reads all.

    Raises:
      UserError: the batch is larger than the data set, or the sources of a row set give different fields.
    """
    config.check_least(0, "config.data", workers=workers, max_bad_fraction=max_bad_fraction)
    config.check_least(1, "config.data", threads=threads)
    config.check_least(0, "config", seed=seed)
    one = dict(uri=uri, ops=ops, split=split, where=where, index=index, limit=limit, reinforced=reinforced, order=order)
    given = {name: value for name, value in one.items() if value is not None}
    if sources is None:
        parts = {"": config.call(mixture.Part, given, "config.data")}
    elif given:
        name = next(iter(given))
        raise UserError(f"config.data has `sources` and `{name}`; give each source its own `{name}`")
    else:
        parts = mixture.parts(sources)
    buckets = read_buckets(naflex)
    if buckets is None:
        sets = {None: mixture.row_sets(parts, batch_size, seed, tokenizer, rows)}
    else:
        sets = mixture.row_sets_by_length(parts, buckets, seed, tokenizer, rows)
    batches = TrainBatches(sets, seed, buckets)
    loader = Loader(batches, workers=workers, threads=threads, max_bad_fraction=max_bad_fraction)
    if sources is not None or buckets is not None:
        _ = loader.examples  # read now: sources of a row set must give the same fields
    return loader


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
        rows, bad, kinds = [], [], np.full(len(self.slots), "", object)
        for batch in (k, k + 1):
            last = min((batch + 1) * self.batch_size, self.num_examples)
            self.examples.soon(range(batch * self.batch_size, last), next_=batch == k)
        for n, slot in enumerate(self.slots):
            i = k * self.batch_size + slot
            try:
                rows.append(self.examples.row(i, i) if i < self.num_examples else None)
            except BadExample as error:
                rows.append(None)
                bad.append(self.examples.bad_record(i, error))
                kinds[n] = error.kind
        mask = np.array([row is not None for row in rows])
        # Masked rows repeat a good example, for its shape: one of the batch, or any other if the batch has none.
        filler = next((row for row in rows if row is not None), None)
        if filler is None:
            tries = range(min(SUBSTITUTES, self.num_examples))
            filler = self.examples.row_or_next(tries[0], tries[1:], 0, [])
        batch = self.examples.collate([filler if row is None else row for row in rows])
        return batch | {"mask": mask, "bad": kinds}, bad

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
    """Returns one pass in the source's order, in batches of equal size.

    `mask` (bool [B]) is False for rows beyond the last example and for bad examples; `bad` (str [B]) is the kind of a
    bad example, else empty. All processes get the same number
    of batches, and each process its rows. Arguments as in `train_loader`. The result can be iterated again.
    """
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}; expected 1 or more")
    examples = open_examples(uri=uri, ops=ops, split=split, where=where, tokenizer=tokenizer, seed=seed)
    if not len(examples):
        chosen = f" with where={dict(where)}" if where else ""
        raise UserError(f"data set `{uri}`, split `{split}`, has no examples{chosen}")
    slots = range(batch_size) if rows is None else [int(row) for row in rows]
    return EvalBatches(examples, batch_size, slots, threads, max_bad_fraction)
