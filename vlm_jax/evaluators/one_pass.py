"""One pass of a model over a data set, shared by all evaluators.

The pass opens the data, reads this host's rows, counts, continues after a kill, gathers from all hosts, and sends the
first host's result to all. An evaluator adds `rows(batch)`, the rows to keep of a batch, and `finish(tables)`, the
result.
"""

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlm_jax import command
from vlm_jax.data import loader
from vlm_jax.data.examples import Examples
from vlm_jax.data.ops import parse
from vlm_jax.data.source import Source, check_field
from vlm_jax.data.sources import open_source
from vlm_jax.errors import UserError
from vlm_jax.evaluators import ops as evaluation_ops  # noqa: F401 (registers `boxed` and `thumbnail`)
from vlm_jax.evaluators.hosts import Hosts
from vlm_jax.evaluators.labels import Classes, Look, some, strangers
from vlm_jax.evaluators.progress import Progress, Table
from vlm_jax.evaluators.records import read_fields
from vlm_jax.evaluators.result import Result
from vlm_jax.run import processes

Columns = Mapping[str, np.ndarray]


class Batch(NamedTuple):
    """A batch of B rows in the order of the data set, and the rows that count.

    Attributes:
      inputs: the model's input, a tree of arrays [B, ...]; on several hosts only this host's rows are filled.
      size: B.
      kept: int [n], the rows that count, n > 0.
      position: int [n], the places of these rows in the data set.
      about: n values, one for each of these rows, see `Pass.run`.
    """

    inputs: Any
    size: int
    kept: np.ndarray
    position: np.ndarray
    about: list

    def spread(self, values: Sequence, filler: Any) -> list:
        """One value for each of the B rows: `values` [n] at the rows that count, `filler` at the others."""
        rows = [filler] * self.size
        for row, value in zip(self.kept, values, strict=True):
            rows[row] = value
        return rows


def picture_ops(ops: str, *fields: str) -> str:
    """Op string from a record to `image` (by the op string `ops`) and `fields`, a list of the values at paths."""
    return f'decode | {field_ops(*fields)} | {ops} | keep("image", "fields")'


def pictures_ops(ops: str, pictures: Mapping[str, str], *fields: str) -> str:
    """Op string from a record to several pictures after `ops`, name -> path, and `fields`, the values at paths."""
    string = field_ops(*fields)
    for name, path in pictures.items():
        string += f' | rename({json.dumps(path)}, "image") | decode | {ops} | rename("image", "{name}")'
    return f"{string} | keep({', '.join(map(json.dumps, (*pictures, 'fields')))})"


def field_ops(*fields: str) -> str:
    """Op that sets `fields` to a list of a record's values at paths."""
    return f'boxed({"".join(f"{json.dumps(path)}, " for path in fields)}to="fields")'


BAD = "bad "  # before the kind of bad examples, in a counter's name


class Pass:
    """One pass of a model over a data set.

        data = Pass(pretrained, progress, uri="tfds:emoji", ops=picture_ops(pretrained.preprocess, "concept"), ...)
        data.begin("pictures")
        data.run(lambda batch: {"pictures": {"embedding": embed(batch)}}, about=lambda fields: fields[0])
        return data.result(finish)

    Several passes of one evaluation share one progress under different names; all begin before the first runs.

    Args:
      pretrained: the model, which runs on its `mesh`. None: no model, each host reads everything.
      progress: the tables and the finished batches; defaults to tables in memory and no finished batch.
      uri, split, where, ops, batch_size: as for `loader.eval_batches`.
      inputs: one or several fields of a batch, the model's input.
      memory: bytes that the tables may take together; larger tables go to files.
      name: a prefix of the counters' names.

    Attributes:
      pretrained: the model, prepared to embed such batches.
      first: whether this process counts and writes.
      batch_size: examples of a batch over all hosts, see `Hosts`.
      tables: name -> `Table`; only the first host's tables are filled.
      counts: "batches" done, "examples" that count, "left_out", bad ones by kind, and the counters of `append`; equal
        on all hosts.
    """

    def __init__(
        self,
        pretrained: Any,
        progress: Progress | None = None,
        *,
        uri: str,
        ops: str,
        batch_size: int,
        split: str | None = None,
        where: Mapping[str, Sequence] | None = None,
        inputs: str | tuple[str, ...] = "image",
        memory: float = float("inf"),
        name: str = "",
    ):
        self._hosts = Hosts(getattr(pretrained, "mesh", None), batch_size)
        self._batches = loader.eval_batches(
            uri=uri, split=split, where=where, ops=ops, tokenizer=getattr(pretrained, "tokenizer", None),
            batch_size=self._hosts.batch_size, rows=self._hosts.rows,
        )  # fmt: skip
        processes.check_equal({uri: self._batches.examples.fingerprint()}, "data")
        self._progress, self._data, self._inputs = progress or Progress(), (uri, split), inputs
        self._memory, self._name = memory, name
        self.pretrained = self._hosts.place(pretrained)
        self.first, self.batch_size = self._hosts.first, self._hosts.batch_size
        self.tables: dict[str, Table] = {}
        self.counts = {"batches": 0, "examples": 0, "left_out": 0}

    @property
    def about(self) -> str:
        """The data set, for people."""
        uri, split = self._data
        return f"data set `{uri}`, split `{split}`" if split else f"data set `{uri}`"

    @property
    def num_examples(self) -> int:
        """Examples of the data set, bad ones included."""
        return self._batches.num_examples

    @property
    def source(self) -> Source:
        """All records of the data set, with the fields that the ops need."""
        return self._batches.examples.source

    def fields(self, *paths: str) -> list[list[Any] | None]:
        """The values at `paths` of every example, read without pictures; None for an example that lacks a field."""
        return read_fields(open_source(*self._data), self._batches.examples.chosen, paths)

    def records(self) -> np.ndarray:
        """The number of each example's record in the data set, int [num_examples]."""
        chosen = self._batches.examples.chosen
        return np.arange(self.num_examples) if chosen is None else chosen

    def check_field(self, path: str) -> None:
        """Raises a UserError that lists the fields if the first records have no field `path`."""
        check_field(self.source, path, self.about, lambda: open_source(*self._data))

    def look(self, classes: Classes, label: str) -> Look:
        """The function from an example's label to its class, see `Classes.look`."""
        self.check_field(label)
        return classes.look(self.source.label_names(label), self.about)

    def left_out(self, label: str, look: Look) -> Counter:
        """Label -> count of the examples whose label is in no class; empty if none is left out."""
        return strangers(self.fields(label), look) if self.counts["left_out"] else Counter()

    def check_any(self, kept: int, label: str, classes: Classes, look: Look) -> None:
        """Raises a UserError that shows labels and classes if no example was kept."""
        if not kept:
            found = [name for name, _ in strangers(self.fields(label), look).most_common()]
            hint = "; the task `multi_label` takes several" if any(name.startswith("[") for name in found) else ""
            raise UserError(
                f"{self.about}: no picture's `{label}` is among the classes {some(classes.names)}; "
                + (f"the labels are {some(found)}{hint}" if found else "no picture could be read")
            )

    def only(self, places: np.ndarray) -> None:
        """Restricts the pass to the examples at these places, in this order."""
        self._batches = copy.copy(self._batches)
        examples = self._batches.examples = copy.copy(self._batches.examples)
        examples.chosen = places if examples.chosen is None else examples.chosen[places]
        self._batches.num_examples = len(places)

    def begin(self, *tables: str, **facts: int | str) -> None:
        """Opens the tables and restores the counters of the progress.

        Raises:
          UserError: the progress was made with other `facts`, another number of examples or another batch size.
        """
        own = {f"{self._name}examples": self.num_examples, "batch_size": self.batch_size}
        saved = self._hosts.from_first(self._progress.begin(**own | facts))
        self.counts |= {key.removeprefix(self._name): n for key, n in saved.items() if key.startswith(self._name)}
        self.tables = {table: self._progress.table(table, self._memory / len(tables)) for table in tables}

    def append(self, rows: Mapping[str, Columns], **counts: int) -> None:
        """Appends rows, table -> column -> [n, ...], and saves tables and counters, see `Progress.save`."""
        if self.first:
            for table, columns in rows.items():
                self.tables[table].append(**columns)
        self.counts |= counts
        self._progress.save(**{f"{self._name}{key}": value for key, value in counts.items()})

    def run(
        self,
        rows: Callable[[Batch], Mapping[str, Columns]],
        about: Callable[..., Any],
        columns: Sequence[str] = ("fields",),
    ) -> int:
        """Appends `rows(batch)` of all unfinished batches; returns the number of rows of the first table.

        Args:
          rows: batch -> the rows to keep, table -> column -> [n, ...]; every host calls `rows`, only the first host
            appends the result.
          about: an example's values of `columns` -> its JSON-able value in `Batch.about`; None leaves the example out.
            Batches without an example that counts are skipped.
          columns: fields of a batch, or "position", an example's place in the data set.
        """
        for k, part in self._parts():
            every = self._hosts.gather(self._about(k, part, about, columns))
            kept = np.array([i for i, (_, _, value) in enumerate(every) if value is not None], np.int64)
            made = {}
            if len(kept):
                inputs = part[self._inputs] if isinstance(self._inputs, str) else tuple(map(part.get, self._inputs))
                own = [value for _, _, value in every if value is not None]
                position = k * self.batch_size + kept
                made = rows(Batch(self._hosts.whole(inputs), self.batch_size, kept, position, own))
            more = Counter(f"{BAD}{kind}" for _, kind, _ in every if kind)
            more |= {"examples": len(kept), "left_out": sum(real for real, _, _ in every) - len(kept)}
            self.append(made, batches=k + 1, **{key: self.counts.get(key, 0) + n for key, n in more.items()})
        return self._hosts.from_first(len(next(iter(self.tables.values()))))

    def result(self, finish: Callable[[Mapping[str, Table]], Result], *counts: str) -> Result:
        """Returns `finish(tables)` with some counters as metrics; all hosts get the first host's, without artifacts."""
        result = finish(self.tables) if self.first else Result({}, {})
        metrics, notes = result.metrics | {name: float(self.counts[name]) for name in counts}, list(result.notes)
        if bad := {key.removeprefix(BAD): n for key, n in self.counts.items() if key.startswith(BAD)}:
            metrics["bad_examples"] = float(sum(bad.values()))
            kinds = ", ".join(f"{n} by their {kind}" for kind, n in sorted(bad.items()))
            notes.append(f"examples that cannot be used do not count: {kinds}; the log names them")
        metrics, intervals, notes = self._hosts.from_first([metrics, result.intervals, notes])
        return result._replace(metrics=metrics, intervals=intervals, notes=notes)

    def from_first(self, value: Any) -> Any:
        """The first host's JSON-able value."""
        return self._hosts.from_first(value)

    def look_up(self, ops: str, positions: Sequence[int]) -> list[dict[str, Any]]:
        """Returns the examples at some places of the data set, made by another op string."""
        pipeline, own = parse(ops), self._batches.examples
        examples = Examples(own.source.narrow(pipeline.paths), pipeline, own.chosen, own.seed)
        return [examples.read(int(i), int(i)) for i in positions]

    def thumbnails(self, positions: Sequence[int]) -> np.ndarray:
        """Returns the pictures at some places, to look at, uint8 [n, 96, 96, 3]."""
        return np.stack([row["thumbnail"] for row in self.look_up('decode | thumbnail | keep("thumbnail")', positions)])

    def _parts(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """(k, this host's part of batch k) of the unfinished batches, with a progress bar."""
        done, total, show = self.counts["batches"], len(self._batches), self._progress.show
        if show and done:
            print(f"continuing after {done:,} of {total:,} batches")
        rest = _From(self._batches, done)
        yield from enumerate(
            command.bar(rest, initial=done, total=total, desc="embed", unit="batch", disable=not show), done
        )

    def _about(self, k: int, part: Mapping[str, Any], about: Callable, columns: Sequence[str]) -> list[list]:
        """[whether it is a good example, its kind if bad, the value of `about`] of each of this host's rows."""
        rows = np.arange(self.batch_size) if self._hosts.rows is None else self._hosts.rows
        part = part | {"position": k * self.batch_size + rows}
        values = zip(part["mask"].tolist(), part["bad"].tolist(), *(part[name] for name in columns), strict=True)
        return [[real, kind, about(*own) if real else None] for real, kind, *own in values]


class _From(loader.EvalBatches):
    """The batches from number `start` on."""

    def __init__(self, batches: loader.EvalBatches, start: int):
        self.__dict__ |= batches.__dict__ | {"start": start}

    def __len__(self) -> int:
        return super().__len__() - self.start

    def __getitem__(self, k: int) -> Any:
        return super().__getitem__(self.start + k)
