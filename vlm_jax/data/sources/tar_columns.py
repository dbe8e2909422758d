"""Where the records of tar shards are: a few columns of numbers, in memory or mapped from an index on disk."""

import collections
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vlm_jax.data.sources.tar_headers import BLOCK, OTHERS, scan
from vlm_jax.data.storage import stamp_of
from vlm_jax.errors import UserError

NO_RECORD = "members of no record"
MOST = 2**32 - 1  # of a column's number

# A shard: its stamp; how much of each column it has; a hash of its records; counts for reports.
SHARD = np.dtype(
    [
        *((name, "<i8") for name in ("size", "version", "records", "members", "key_bytes")),
        ("digest", "<u8"),
        *((name, "<i8") for name in ("no_record", "others", "again", "differing")),
    ]
)


class Columns(NamedTuple):
    """The records of S shards: N records of M members, with K bytes of keys.

    Attributes:
      shards: SHARD [S].
      bounds: uint32 [N + S, 3], a row for each record and one for each shard's end: first member and first byte of the
        key, both counted from the shard's first, and whether the key comes again with other members.
      members: uint32 [M, 3], a row for each member: number of its extension, first 512-byte block, bytes (`MOST` for
        more).
      keys: uint8 [K].
      extensions: names by number.
    """

    shards: np.ndarray
    bounds: np.ndarray
    members: np.ndarray
    keys: np.ndarray
    extensions: Sequence[str]


class Starts(NamedTuple):
    """The first row of each shard in the columns, int64 [S] each."""

    bounds: np.ndarray
    members: np.ndarray
    keys: np.ndarray


def starts(shards: np.ndarray) -> Starts:
    """Returns the first rows of shards, SHARD [S]."""
    counts = shards["records"] + 1, shards["members"], shards["key_bytes"]
    return Starts(*(np.cumsum(count) - count for count in counts))


def shard(columns: Columns, number: int, first: Starts) -> Columns:
    """Returns the columns of one shard."""
    row = columns.shards[number : number + 1]
    bounds, members, keys = (int(column[number]) for column in first)
    return Columns(
        row,
        columns.bounds[bounds : bounds + int(row["records"][0]) + 1],
        columns.members[members : members + int(row["members"][0])],
        columns.keys[keys : keys + int(row["key_bytes"][0])],
        columns.extensions,
    )


def numbered(columns: Columns, numbers: dict[str, int]) -> np.ndarray:
    """Returns `members` with extensions by `numbers`, a name -> number that grows by the new ones.

    Raises:
      UserError: a member's extension has no name.
    """
    members = np.array(columns.members)
    used = np.unique(members[:, 0]).tolist()
    if used and used[-1] >= len(columns.extensions):
        raise UserError("the index of shards is damaged; remove its folder and write it again with `vlm-jax index`")
    table = np.zeros(max(used, default=0) + 1, np.uint32)
    for number in used:
        table[number] = numbers.setdefault(columns.extensions[number], len(numbers))
    members[:, 0] = table[members[:, 0]]
    return members


def joined(parts: Sequence[Columns]) -> Columns:
    """Returns the columns of shards one after the other."""
    numbers: dict[str, int] = {}
    members = [numbered(part, numbers) for part in parts]
    return Columns(
        np.concatenate([part.shards for part in parts]),
        np.concatenate([part.bounds for part in parts]),
        np.concatenate(members),
        np.concatenate([part.keys for part in parts]),
        list(numbers),
    )


def read_shard(path: str) -> Columns:
    """Returns the columns of a tar file, from its headers.

    Members named `key.ext` that follow each other with the same key are one record; an extension that comes again
    begins another.

    Raises:
      UserError: see `scan`; or the shard has more than 2 TiB.
    """
    contents, left_out = hashlib.blake2b(digest_size=8), {}
    numbers: dict[str, int] = {}
    members, firsts, keys = [], [], []
    records: dict[str, list[int]] = collections.defaultdict(list)
    previous, held, no_record = None, set(), 0
    stamp = stamp_of(path)
    for name, offset, size in scan(path, contents, left_out):
        folder, _, base = name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not dot or (base[0] in "._Td" and _is_odd(base)) or (folder and _is_odd_folder(folder)):
            no_record += 1
            continue
        extension, key = extension.lower(), f"{folder}/{stem}" if folder else stem
        if key != previous or extension in held:
            records[key].append(len(firsts))
            firsts.append(len(members) // 3)
            keys.append(key)
            previous, held = key, set()
        held.add(extension)
        members += numbers.setdefault(extension, len(numbers)), offset // BLOCK, size
    members = np.asarray(members, np.int64).reshape(-1, 3)
    keys = [key.encode("utf-8", "surrogateescape") for key in keys]
    bounds = np.zeros((len(firsts) + 1, 3), np.int64)
    bounds[:, 0] = [*firsts, len(members)]
    bounds[1:, 1] = np.cumsum([len(key) for key in keys])
    members[:, 2] = np.minimum(members[:, 2], MOST)
    differing = _differing(records, bounds[:, 0], members[:, 0])
    bounds[differing, 2] = 1
    if max(bounds.max(), members.max(initial=0)) > MOST:
        raise UserError(f"shard `{path}` has {stamp.size:,} bytes; expected at most 2 TiB: split it")
    bounds, members = bounds.astype(np.uint32), members.astype(np.uint32)
    blob, extensions = np.frombuffer(b"".join(keys), np.uint8), list(numbers)
    for part in (bounds, members, blob, json.dumps(extensions).encode()):
        contents.update(part)
    row = (
        *(*stamp, len(firsts), len(members), len(blob), int.from_bytes(contents.digest(), "little")),
        *(no_record, left_out.get(OTHERS, 0), len(firsts) - len(records), len(differing)),
    )
    return Columns(np.array([row], SHARD), bounds, members, blob, extensions)


def _differing(records: Mapping[str, list[int]], firsts: np.ndarray, extensions: np.ndarray) -> list[int]:
    """Returns the records of one shard that share their key and differ in their members."""
    found = []
    for numbers in records.values():
        if len(numbers) > 1:
            held = [set(extensions[firsts[i] : firsts[i + 1]].tolist()) for i in numbers]
            if any(one != held[0] for one in held):
                found += numbers
    return found


def _is_odd(part: str) -> bool:
    """Whether a file or folder of this name is of an operating system or of a tool."""
    dotted = part.startswith(".") and part not in (".", "..")
    return dotted or part in ("__MACOSX", *FILES) or (part.startswith("__") and part.endswith("__"))


FILES = ("Thumbs.db", "desktop.ini")


@functools.lru_cache(maxsize=2**10)
def _is_odd_folder(folder: str) -> bool:
    return any(part not in FILES and _is_odd(part) for part in folder.split("/"))
