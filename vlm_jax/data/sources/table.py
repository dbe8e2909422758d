"""`jsonl:` and `csv:`: rows of a table, with the paths of their pictures."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.data.source import BadExample
from vlm_jax.data.sources.image_files import IMAGE_SUFFIXES, ImageFiles, existing, read

# The columns of a table that may hold an image's path, in this order of preference.
PATH_COLUMNS = ("image", "image_path", "file_path", "filepath", "file_name", "filename", "path")


class Table(ImageFiles):
    """Rows of a table; a column of image paths (relative to the table's folder) becomes the field "image"."""

    path: Path

    def row(self, i: int) -> dict[str, Any]:
        raise NotImplementedError

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = self.row(i)
        for column in PATH_COLUMNS if self.with_image else ():
            name = row.get(column)
            if isinstance(name, str) and name.lower().endswith(IMAGE_SUFFIXES):
                row["image"] = read(self.path.parent / name)
                break
        return row

    def key(self, i: int) -> str:
        return f"{self.path.name}:{i + 1}"


class Jsonl(Table):
    """One JSON object a line; the file is scanned once for line starts, then read by offset."""

    def __init__(self, path: str):
        self.path = existing(f"jsonl:{path}", path)
        starts, lengths, at = [], [], 0
        with open(self.path, "rb") as file:
            for line in file:
                if line.strip():
                    starts.append(at)
                    lengths.append(len(line))
                at += len(line)
        self.starts, self.lengths = np.asarray(starts, np.int64), np.asarray(lengths, np.int64)

    def __len__(self) -> int:
        return len(self.starts)

    def row(self, i: int) -> dict[str, Any]:
        with open(self.path, "rb") as file:
            line = os.pread(file.fileno(), int(self.lengths[i]), int(self.starts[i]))
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BadExample(f"not JSON: {error}") from None
        if not isinstance(row, dict):
            raise BadExample(f"is a JSON {type(row).__name__}, expected an object")
        return row


class Csv(Table):
    """Rows under a header, held in memory; tab-separated if the header has a tab, else comma-separated."""

    def __init__(self, path: str):
        self.path = existing(f"csv:{path}", path)
        with open(self.path, newline="", encoding="utf-8-sig") as file:
            header = file.readline()
            file.seek(0)
            self.rows = list(csv.DictReader(file, delimiter="\t" if "\t" in header else ","))

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, i: int) -> dict[str, Any]:
        return {k: v for k, v in self.rows[i].items() if k is not None and v is not None}

    def key(self, i: int) -> str:
        return f"{self.path.name}:{i + 2}"
