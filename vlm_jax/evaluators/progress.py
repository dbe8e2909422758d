"""The saved progress of an evaluation, which continues after a kill: rows in bounded memory or files."""

import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from vlm_jax.data.files import naming, read_kept, write_json
from vlm_jax.errors import UserError

SAVE_SECONDS = 1.0  # at most this much work, and one batch, is repeated after a kill


def available_memory() -> int:
    """Bytes of memory that are free now; all memory if the system does not report free memory."""
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def memory_limit(share: float) -> float:
    """A share of the available memory, in bytes."""
    if not 0 < share <= 1:
        raise UserError(f"memory_share is {share}; expected a share between 0 and 1, e.g. 0.25")
    return share * available_memory()


class Table:
    """Columns of equal length: rows are appended in chunks; any range of rows can be read.

    Args:
      folder: the folder of the columns' files; None keeps columns in memory, and in temporary files beyond `limit`.
      name: the table's name, a prefix of its files' names.
      limit: bytes of memory that the columns may take together.
      saved: the result of `layout` when the table was last saved; later rows in the files are dropped.
    """

    def __init__(self, folder: Path | None, name: str, limit: float, saved: dict[str, Any] | None = None):
        self._folder, self._name, self._limit = folder, name, limit
        self._rows, self._columns = 0, {}
        self._files: dict[str, IO[bytes]] = {}
        self.in_memory = folder is None
        if saved:
            self._rows = saved["rows"]
            for column, (dtype, shape) in saved["columns"].items():
                self._columns[column] = np.dtype(dtype), tuple(shape)
                self._files[column] = self._open(column)
                self._files[column].truncate(self._rows * self._row_bytes(column))

    def __len__(self) -> int:
        return self._rows

    def append(self, **columns: np.ndarray) -> None:
        """Appends arrays [n, ...] of equal n; the first call fixes the columns' names, dtypes and shapes."""
        if not self._columns:
            self._columns = {column: (rows.dtype, rows.shape[1:]) for column, rows in columns.items()}
            self._files = {column: self._open(column) for column in columns}
        self._check({column: rows.shape[1:] for column, rows in columns.items()})
        for column, (dtype, _) in self._columns.items():
            rows = np.ascontiguousarray(columns[column], dtype)
            with naming(self._folder or tempfile.gettempdir()):
                self._files[column].seek(self._rows * self._row_bytes(column))
                self._files[column].write(rows.tobytes())
        self._rows += len(rows)
        if self.in_memory and self._rows * sum(map(self._row_bytes, self._columns)) > self._limit:
            self.in_memory = False
            for file in self._files.values():
                file.rollover()

    def _check(self, columns: Mapping[str, tuple[int, ...]]) -> None:
        own = {column: shape for column, (_, shape) in self._columns.items()}
        if columns != own:
            where = f" in {self._folder}; delete it if it was saved by another evaluation" if self._folder else ""
            raise UserError(f"the table `{self._name}` has rows {own}, not {dict(columns)}{where}")

    def read(self, column: str, rows: slice = slice(None)) -> np.ndarray:
        """Returns consecutive rows of a column, [n, ...]; reads only these rows."""
        start, stop, _ = rows.indices(self._rows)
        if column not in self._columns:
            raise UserError(f"the table `{self._name}` has no column `{column}`; delete {self._folder} to start anew")
        dtype, shape = self._columns[column]
        self._files[column].seek(start * self._row_bytes(column))
        data = self._files[column].read((stop - start) * self._row_bytes(column))
        return np.frombuffer(data, dtype).reshape(stop - start, *shape)

    def layout(self) -> dict[str, Any]:
        """Flushes the files to disk; returns the `saved` argument that opens the table again, JSON-able."""
        for file in self._files.values():
            with naming(self._folder or tempfile.gettempdir()):
                file.flush()
                os.fsync(file.fileno())
        columns = {column: [dtype.str, list(shape)] for column, (dtype, shape) in self._columns.items()}
        return {"rows": self._rows, "columns": columns}

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _open(self, column: str) -> IO[bytes]:
        if self._folder is None:
            return tempfile.SpooledTemporaryFile()  # on disk from `rollover` on
        path = self._folder / f"{self._name}.{column}"
        return open(path, "r+b" if path.exists() else "w+b")

    def _row_bytes(self, column: str) -> int:
        dtype, shape = self._columns[column]
        return dtype.itemsize * math.prod(shape)


class Progress:
    """Tables and counters of one evaluation, saved in a folder.

    Args:
      folder: is made if missing; the progress of a killed evaluation in it continues. None: nothing is saved.
      show: prints where the evaluation continues and shows a progress bar.
    """

    def __init__(self, folder: str | os.PathLike | None = None, show: bool = False):
        self.folder, self.show = None if folder is None else Path(folder), show
        self._tables: dict[str, Table] = {}
        self._record = {"facts": {}, "counts": {}, "tables": {}}
        self._saved_at = time.monotonic()
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            saved = read_kept(self.folder / "progress.json")
            if saved is not None and not _is_whole(saved, self.folder):
                logging.warning("%s is damaged; the evaluation starts anew", self.folder)
                saved = None
            self._record = saved or self._record
        self._facts = dict(self._record["facts"])  # of the saved progress

    def begin(self, **facts: int | str) -> dict[str, int]:
        """Returns the last saved counters; empty at the start. Each pass of an evaluation has its own facts.

        Raises:
          UserError: `facts` (about the data, the names) differ from the facts of the saved progress.
        """
        for key, value in facts.items():
            before = self._facts.get(key) if self._facts else value
            if before != value:
                raise UserError(
                    f"{self.folder} holds the progress of an evaluation with {key} = {before}, now it is {value}; "
                    "choose another --out or delete it"
                )
        self._record["facts"] |= facts
        return self._record["counts"]

    def table(self, name: str, limit: float) -> Table:
        """Opens the table of this name: new, or as last saved. `limit`: see `Table`."""
        self._tables[name] = Table(self.folder, name, limit, self._record["tables"].get(name))
        return self._tables[name]

    def save(self, now: bool = False, **counts: int) -> None:
        """Sets counters; saves tables and counters about every second, or `now`."""
        self._record["counts"] |= counts
        if self.folder is None or (not now and time.monotonic() < self._saved_at + SAVE_SECONDS):
            return
        self._record["tables"] |= {name: table.layout() for name, table in self._tables.items()}
        write_json(self.folder / "progress.json", self._record)
        self._saved_at = time.monotonic()

    def delete(self) -> None:
        """Closes the tables and deletes the folder."""
        for table in self._tables.values():
            table.close()
        if self.folder is not None:
            shutil.rmtree(self.folder)


def _is_whole(record: Mapping[str, Any], folder: Path) -> bool:
    """Returns whether saved progress has facts, counters and tables, and files with as many rows."""
    try:
        counts = all(type(count) in (int, float) for count in record["counts"].values())
        for name, table in record["tables"].items():
            for column, (dtype, shape) in table["columns"].items():
                row = np.dtype(dtype).itemsize * math.prod(shape)
                numbers = np.dtype(dtype).kind in "biuf" and row >= 0 and table["rows"] >= 0 and "/" not in column
                if not numbers or (folder / f"{name}.{column}").stat().st_size < table["rows"] * row:
                    return False
        return counts and isinstance(record["facts"], dict)
    except (LookupError, TypeError, ValueError, AttributeError, OSError, RecursionError):
        return False
