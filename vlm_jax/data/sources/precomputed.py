"""`precomputed:`: embeddings instead of pictures, written by `python -m vlm_jax.precompute`.

The folder holds index.json (the data set, image tower, initial parameters and preprocessing) and ArrayRecord shards:
one float32 vector for each record of the data set, in order; an empty vector if the picture could not be used.
"""

import contextlib
import copy
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from array_record.python import array_record_module

from vlm_jax.data import confined
from vlm_jax.data.files import naming
from vlm_jax.data.source import BadExample, Source
from vlm_jax.errors import UserError

INDEX = "index.json"
MAX_INDEX_BYTES = 2**24


class Precomputed(Source):
    """The records of a data set, with an embedding, float32 [D], under "image".

    Args:
      path: the folder.
      open_source: opens the data set by URI and split.
    """

    with_image = True

    def __init__(self, path: str, open_source: Callable[[str, str | None], Source]):
        what = f"data source `precomputed:{path}`"
        index = read_index(Path(path), what)
        if index["uri"].startswith("precomputed:"):
            raise UserError(f"{what} is of `{index['uri']:.80}`; expected a data set of pictures")
        self.embeddings, self.shards = open_shards(Path(path), index, what)
        self.source = open_source(index["uri"], index["split"])
        self.remote = self.source.remote
        if len(self.source) != index["records"]:
            raise UserError(
                f"{what} has {index['records']} embeddings, {index['uri']} has "
                f"{len(self.source)} records: the data set has changed; write to another folder"
            )

    def __len__(self) -> int:
        return len(self.source)

    def label_names(self, path: str) -> dict[int, str] | None:
        return self.source.label_names(path)

    def narrow(self, paths: frozenset[str]) -> Self:
        narrowed = copy.copy(self)
        narrowed.source, narrowed.with_image = self.source.narrow(paths - {"image"}), "image" in paths
        return narrowed

    def __getitem__(self, i: int) -> dict[str, Any]:
        record = self.source[i]
        if self.with_image:
            embedding = np.frombuffer(self.embeddings[i], np.float32)
            if not embedding.size:
                raise BadExample("the picture could not be embedded", "picture")
            record["image"] = embedding
        return record

    def key(self, i: int) -> str:
        return self.source.key(i)

    def warn_of_window(self, count: int) -> None:
        self.source.warn_of_window(count)

    def soon(self, numbers: Iterable[int], next_: bool = False) -> None:
        self.source.soon(numbers, next_)

    def fingerprint(self) -> str:
        return f"{confined.fingerprint(self.shards)} of {self.source.fingerprint()}"


def read_index(folder: Path, what: str, also: Mapping[str, tuple[type, ...]] | None = None) -> dict[str, Any]:
    """Returns the content of a folder's index.json, its types checked.

    Args:
      folder: with the shards.
      what: begins messages.
      also: {key: its types} beside those that every index has.

    Raises:
      UserError: the file cannot be read, or is another.
    """
    kinds = dict(records=(int,), shard_size=(int,), uri=(str,), split=(str, type(None)), **also or {})
    path = folder / INDEX
    if not path.is_file():
        raise UserError(f"{what} has no {INDEX}; write it with vlm_jax.precompute")
    try:
        index = json.loads(path.read_text("utf-8")) if path.stat().st_size <= MAX_INDEX_BYTES else None
    except (OSError, ValueError, RecursionError):
        index = None
    if not isinstance(index, dict):
        raise UserError(f"{what}: its {INDEX} is not JSON of an object; write it anew with vlm_jax.precompute")
    wrong = [name for name, kind in kinds.items() if type(index.get(name)) not in kind]
    wrong += [name for name in ("records", "shard_size") if name not in wrong and index[name] < (name == "shard_size")]
    if wrong:
        raise UserError(f"{what}: its {INDEX} has {wrong[0]} {index.get(wrong[0])!r:.80}; write it anew")
    return index | {"split": index.get("split")}


def open_shards(folder: Path, index: Mapping[str, Any], what: str) -> tuple[Sequence[bytes], list[str]]:
    """Returns the rows of all shards, and the shards' paths; arguments as of `read_index`.

    Raises:
      UserError: a shard is missing, or damaged.
    """
    from grain.sources import ArrayRecordDataSource  # imports JAX; 2 s, hence here

    count = -(-index["records"] // index["shard_size"])
    there = {entry.name for entry in os.scandir(folder) if entry.is_file()}
    missing = next((name for name in _names(index["records"], index["shard_size"]) if name not in there), None)
    if missing:
        lacking = count - sum(name.endswith(f"-of-{count:05d}.array_record") for name in there)
        raise UserError(
            f"{what} lacks {lacking} of {count} shards, {missing} first; "
            "run the same vlm_jax.precompute again to write the rest"
        )
    shards = [str(folder / name) for name in shard_names(index["records"], index["shard_size"])]
    try:
        rows = ArrayRecordDataSource(shards) if shards else []
        found = len(rows)
    except Exception as error:  # of a damaged shard
        raise UserError(f"{what} cannot be read: {error}") from None
    if found != index["records"]:
        raise UserError(f"{what} has {found} embeddings, its {INDEX} says {index['records']}; write it anew")
    return rows, shards


def shard_names(records: int, shard_size: int) -> list[str]:
    """Returns the file names of the shards of `records` records."""
    return list(_names(records, shard_size))


def _names(records: int, shard_size: int) -> Iterator[str]:
    count = -(-records // shard_size)
    return (f"embeddings-{k:05d}-of-{count:05d}.array_record" for k in range(count))


def write_shard(path: Path, embeddings: Iterable[np.ndarray | None]) -> None:
    """Writes vectors, or None for an unusable picture, each; the file appears once complete."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
            for embedding in embeddings:
                writer.write(b"" if embedding is None else embedding.tobytes())
            writer.close()
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_shard(path: Path, dtype: Any = np.float32) -> list[np.ndarray | None]:
    """Returns what `write_shard` wrote of this dtype; an empty list if there is no such file, or if it is damaged."""
    if not path.is_file():
        return []
    try:
        with contextlib.closing(array_record_module.ArrayRecordReader(str(path))) as reader:
            rows = [np.frombuffer(data, dtype) for data in reader.read_all()]
    except (ValueError, RuntimeError):
        return []
    return [row if row.size else None for row in rows]
