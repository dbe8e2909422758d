"""`jsonl:` and `csv:`: rows of a table, with the paths of their pictures."""

import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.data import confined
from vlm_jax.data.source import BadExample
from vlm_jax.data.sources.delimited import read_rows
from vlm_jax.data.sources.image_files import IMAGE_SUFFIXES, ImageFiles

# The columns of a table that may hold an image's path, in this order of preference.
PATH_COLUMNS = ("image", "image_path", "file_path", "filepath", "file_name", "filename", "path")
MAX_LINE = 2**26  # bytes of a row


class Table(ImageFiles):
    """Rows of a table; a column of image paths (relative to the table's folder) becomes the field "image".

    Attributes:
      path: the table's file.
      lines: int [n], the rows' line numbers.
      checksum: of the whole file.
    """

    path: Path
    lines: np.ndarray
    checksum: int

    def row(self, i: int) -> dict[str, Any]:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = self.row(i)
        if self.with_image and (name := picture_of(row, self.path.parent)) is not None:
            row["image"] = self.picture(self.path.parent, name)
        return row

    def key(self, i: int) -> str:
        return f"{self.path.name}:{self.lines[i]}"

    def fingerprint(self) -> str:
        return f"{len(self)} rows, crc {self.checksum:08x}"


def picture_of(row: dict[str, Any], folder: Path) -> str | None:
    """The path of the row's picture: of the first column with a picture's ending, else of the first file."""
    names = [row[column] for column in PATH_COLUMNS if isinstance(row.get(column), str) and row[column]]
    for name in names:
        if name.lower().endswith(IMAGE_SUFFIXES):
            break
    else:
        name = next((name for name in names if os.path.isfile(folder / name)), None)
        name = name or next((name for name in names if "://" in name), None)
    if name and "://" in name:
        raise BadExample(f"`{name:.80}` is a URL, not a file; download the pictures first", "file")
    return name


class Jsonl(Table):
    """One JSON object a line; the file is scanned once for line starts, then read by offset."""

    def __init__(self, path: str):
        self.path = confined.regular(f"jsonl:{path}", path)
        starts, lengths, lines, at, self.checksum = [], [], [], 0, 0
        number, whole = 0, True  # whether the last piece ended its line
        with open(self.path, "rb") as file:
            while piece := file.readline(MAX_LINE):
                self.checksum = zlib.crc32(piece, self.checksum)
                number += whole
                if not whole:
                    lengths[-1] += len(piece)
                elif piece.strip(b" \t\r\n\xef\xbb\xbf") or len(piece) == MAX_LINE:
                    starts.append(at)
                    lengths.append(len(piece))
                    lines.append(number)
                at += len(piece)
                whole = len(piece) < MAX_LINE or piece.endswith(b"\n")
        self.starts, self.lengths, self.lines = (np.asarray(x, np.int64) for x in (starts, lengths, lines))

    def row(self, i: int) -> dict[str, Any]:
        length = int(self.lengths[i])
        if length > MAX_LINE:
            raise BadExample(f"has {length:,} bytes, more than {MAX_LINE:,}", "row")
        with open(self.path, "rb", buffering=0) as file:
            line = os.pread(file.fileno(), length, int(self.starts[i]))
        if len(line) < length:
            raise BadExample("is gone: the file is shorter than it was", "row")
        row = parse_json(line)
        if not isinstance(row, dict):
            raise BadExample(f"is a JSON {type(row).__name__}, expected an object", "row")
        return row


def parse_json(data: bytes) -> Any:
    """Returns the value of a JSON text in UTF-8; raises BadExample if it is none."""
    try:
        value = json.loads(data.decode("utf-8-sig"))
        if b"\\u" in data:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        raise BadExample("holds half a surrogate pair, which is no text", "row") from None
    except UnicodeDecodeError as error:
        raise BadExample(f"not UTF-8: byte {data[error.start]:#x} at {error.start}", "row") from None
    except (ValueError, RecursionError) as error:
        raise BadExample(f"not JSON: {error}", "row") from None


class Csv(Table):
    """Rows under a header, held in memory; the header tells whether a tab, `,`, `;` or `|` separates cells.

    A quotation mark that is never closed, or that other text follows, is part of its cell: see `delimited`.
    """

    def __init__(self, path: str):
        uri = f"csv:{path}"
        self.path = confined.regular(uri, path)
        data = self.path.read_bytes()
        self.checksum = zlib.crc32(data)
        self.header, self.rows, lines = read_rows(uri, data, IMAGE_SUFFIXES)
        self.lines = np.asarray(lines, np.int64)

    def row(self, i: int) -> dict[str, Any]:
        cells = self.rows[i]
        if isinstance(cells, str):
            raise BadExample(cells, "row")
        return dict(zip(self.header, cells, strict=False))
