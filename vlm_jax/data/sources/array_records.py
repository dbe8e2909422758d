"""`arrayrecord:`: copies of tar shards in ArrayRecord files, written by `vlm-jax index --to=arrayrecord`.

An entry is the length of a header (4 bytes, little-endian), the header in JSON, and the members' bytes one after the
other. The header has the record's `key`, its `members` ([extension, size] each), and `bad`: why the record is bad, or
null.
"""

import itertools
import json
import os
from collections.abc import Iterator
from typing import Any

from array_record.python import array_record_module

from vlm_jax.data import confined, storage
from vlm_jax.data.files import naming
from vlm_jax.data.source import BadExample, Source
from vlm_jax.data.sources.tar_columns import Columns, read_shard
from vlm_jax.data.sources.tar_shards import DIFFERS, check_there, cut, located, record_of, span, too_large
from vlm_jax.data.storage import open_file, stamp_of
from vlm_jax.errors import StoreError, UserError, mendable

SUFFIX = ".array_record"


class ArrayRecords(Source):
    """The examples of ArrayRecord files; those of the tar shards that the files are copies of, in their order."""

    def __init__(self, pattern: str):
        from grain.sources import ArrayRecordDataSource  # imports JAX; 2 s, hence here

        if storage.is_remote(pattern):
            raise UserError(
                f"data source `arrayrecord:{pattern}`: ArrayRecord files are read from disk alone; copy them, or read "
                "the tar shards from the store by `wds:`"
            )
        self.paths, *_ = located(pattern)
        check_there(f"arrayrecord:{pattern}", self.paths)
        try:
            self.entries = ArrayRecordDataSource(self.paths)
            self.count = len(self.entries)
        except Exception as error:  # of a damaged file
            raise UserError(f"data source `arrayrecord:{pattern}` cannot be read: {error}; write it anew") from None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, Any]:
        header, entry, at = self._entry(i)
        if header["bad"] is not None:
            raise BadExample(header["bad"], "row")
        members = []
        for extension, size in header["members"]:
            members.append((extension, entry[at : at + size]))
            at += size
        return record_of(members)

    def _entry(self, i: int) -> tuple[dict[str, Any], bytes, int]:
        """Returns the header of entry i, the entry, and the place of the members in it."""
        entry = self.entries[i]
        at = 4 + int.from_bytes(entry[:4], "little")
        try:
            header = json.loads(entry[4:at])
            if header.keys() != {"key", "members", "bad"}:
                raise ValueError("another header")
        except (ValueError, AttributeError, RecursionError):
            raise BadExample("no copy of a record of a tar shard", "file") from None
        return header, entry, at

    def key(self, i: int) -> str:
        try:
            return str(self._entry(i)[0]["key"])
        except Exception:  # of a damaged file
            return f"entry {i}"

    def fingerprint(self) -> str:
        return confined.fingerprint(self.paths)


def copied(path: str, copy: str) -> bool:
    """Returns whether a file is the copy of a shard as it is now: its modification time is the shard's version."""
    try:
        return stamp_of(copy).version == stamp_of(path).version
    except OSError:
        return False


def copy(path: str, to: str) -> str | None:
    """Writes a tar shard's copy, whole or not at all; returns why the shard cannot be read, None if it can."""
    try:
        columns = read_shard(path)
    except StoreError:
        raise
    except (UserError, OSError) as error:
        return mendable(error) or f"shard `{path}` cannot be read: {error.strerror}"
    temporary = f"{to}.{os.getpid()}.tmp"
    try:
        with naming(to), open_file(path) as file:
            writer = array_record_module.ArrayRecordWriter(temporary, "group_size:1,uncompressed")
            for entry in _entries(path, columns, file):
                writer.write(entry)
            writer.close()
            os.utime(temporary, ns=(columns.shards["version"][0],) * 2)
            os.replace(temporary, to)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    return None


def _entries(path: str, columns: Columns, file: Any) -> Iterator[bytes]:
    keys, bounds, members = columns.keys.tobytes(), columns.bounds.tolist(), columns.members.tolist()
    for (first, key, differs), (end, key_end, _) in itertools.pairwise(bounds):
        own = members[first:end]
        start, size = span(own)
        bad = DIFFERS if differs else too_large(size)
        parts = [] if bad else cut(file.read(start, size), start, own, columns.extensions)
        name = f"{os.path.basename(path)}/{keys[key:key_end].decode('utf-8', 'surrogateescape')}"
        sizes = [(extension, len(part)) for extension, part in parts]
        header = json.dumps(dict(key=name, members=sizes, bad=bad)).encode()
        yield b"".join([len(header).to_bytes(4, "little"), header, *(part for _, part in parts)])
