"""`parquet:`: rows of Parquet files, with pictures as bytes, as Hugging Face's datasets and img2dataset write them.

    parquet:data/train-*.parquet
    parquet:data/{00000..00099}.parquet

A picture is a struct with `bytes` and `path`, bytes in a column named as an ending (`jpg`, `png`, ...), or a path, as
in other tables. A row is read with its row group, so small groups (100 rows) suit an order at random.
"""

import bisect
import collections
import copy
import itertools
import os
import threading
from pathlib import Path
from typing import Any, Self

from vlm_jax.data import confined
from vlm_jax.data.source import BadExample
from vlm_jax.data.sources.image_files import IMAGE_SUFFIXES, ImageFiles
from vlm_jax.data.sources.table import PATH_COLUMNS, picture_of
from vlm_jax.data.sources.tar_shards import check_there, expand
from vlm_jax.errors import UserError

HELD = 4  # row groups in memory, in each process
MAX_GROUP = 2**28  # bytes of a row group
ENDINGS = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)


class Parquet(ImageFiles):
    """The rows of Parquet files, in their order.

    Args:
      pattern: the files, see `tar_shards.expand`.
    """

    def __init__(self, pattern: str):
        self.uri, self.paths, self.columns = f"parquet:{pattern}", expand(pattern), None
        if not self.paths:
            raise UserError(f"data source `{self.uri}`: no file matches; fix the pattern")
        check_there(self.uri, self.paths)
        self.groups = []  # (file, group) of each row group
        sizes = []
        for path in self.paths:
            about = self._open(path).metadata
            for group in range(about.num_row_groups):
                rows, size = about.row_group(group).num_rows, about.row_group(group).total_byte_size
                if size > MAX_GROUP:
                    raise UserError(
                        f"data source `{self.uri}`: a row group of {path} has {size:,} bytes, more than {MAX_GROUP:,}; "
                        "write it anew with row groups of 100 rows"
                    )
                self.groups.append((path, group))
                sizes.append(rows)
        self.starts = [0, *itertools.accumulate(sizes)]
        self._forget()

    def _open(self, path: str) -> Any:
        import pyarrow.parquet  # 0.2 s, hence here

        try:
            return pyarrow.parquet.ParquetFile(path)
        except (OSError, ValueError) as error:  # pyarrow's errors are kinds of these
            raise UserError(
                f"data source `{self.uri}`: {path} cannot be read: {' '.join(str(error).split())}"
            ) from None

    def _forget(self) -> None:
        self._held: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name not in ("_held", "_lock")}

    def __setstate__(self, state):
        self.__dict__ |= state
        self._forget()

    def narrow(self, paths: frozenset[str]) -> Self:
        narrowed = copy.copy(super().narrow(paths))
        narrowed.columns = {path.split("/")[0] for path in paths}
        narrowed._forget()
        return narrowed

    def _wanted(self, schema: Any) -> list[str] | None:
        """The columns to read: those that were asked for, and those that may hold the picture."""
        if self.columns is None:
            return None
        pictures = {*ENDINGS, *PATH_COLUMNS} if self.with_image else set()
        is_picture = lambda field: field.name.lower() in pictures or (self.with_image and _is_struct(field.type))
        return [field.name for field in schema if field.name in self.columns or is_picture(field)]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, i: int) -> dict[str, Any]:
        number = bisect.bisect_right(self.starts, i) - 1
        (row,) = self._group(number).slice(i - self.starts[number], 1).to_pylist()
        row = {name: value for name, value in row.items() if value is not None}
        return self._with_picture(row, Path(self.groups[number][0]).parent) if self.with_image else row

    def _group(self, number: int) -> Any:
        with self._lock:
            if number in self._held:
                self._held.move_to_end(number)
                return self._held[number]
        path, group = self.groups[number]
        try:
            file = self._open(path)
            table = file.read_row_group(group, self._wanted(file.schema_arrow))
        except (OSError, ValueError, UserError) as error:
            raise BadExample(f"row group {group} cannot be read: {' '.join(str(error).split()):.200}", "file") from None
        with self._lock:
            self._held[number] = table
            while len(self._held) > HELD:
                self._held.popitem(last=False)
        return table

    def _with_picture(self, row: dict[str, Any], folder: Path) -> dict[str, Any]:
        for name in ("image", *(name for name in row if name.lower() in ENDINGS), *row):
            value = row.get(name)
            if isinstance(value, dict) and {"bytes", "path"} <= value.keys():
                value = value["bytes"] if value["bytes"] is not None else self.picture(folder, value["path"] or "")
                return {**{key: other for key, other in row.items() if key != name}, "image": value}
            if isinstance(value, bytes) and (name == "image" or name.lower() in ENDINGS):
                return {**{key: other for key, other in row.items() if key != name}, "image": value}
        if (name := picture_of(row, folder)) is not None:
            row["image"] = self.picture(folder, name)
        return row

    def key(self, i: int) -> str:
        number = bisect.bisect_right(self.starts, i) - 1
        path = self.groups[number][0]
        first = next(k for k, (other, _) in enumerate(self.groups) if other == path)
        return f"{os.path.basename(path)}:{i - self.starts[first]}"

    def fingerprint(self) -> str:
        return confined.fingerprint(self.paths)


def _is_struct(kind: Any) -> bool:
    """Whether a column's type is that of Hugging Face's pictures."""
    return {"bytes", "path"} <= {kind.field(i).name for i in range(kind.num_fields)}
