"""`wds:`: tar shards as img2dataset and the `webdataset` package write them, read by index.

Members named `key.ext` that follow each other with the same key are one example. The headers of all shards are
scanned once; an example is then one read of the bytes between its first and last member.
"""

import collections
import glob
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.data.confined import MAX_BYTES, kind
from vlm_jax.data.source import BadExample, Source
from vlm_jax.data.sources.image_files import IMAGE_SUFFIXES
from vlm_jax.data.sources.table import parse_json
from vlm_jax.data.sources.tar_headers import scan
from vlm_jax.errors import UserError

MAX_SHARDS = 10**6
MAX_BRACES = 16
IMAGE_EXTENSIONS = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)


RANGE = re.compile(r"\{([0-9]{1,18})\.\.([0-9]{1,18})\}")


def expand(pattern: str) -> list[str]:
    """Expands `{000..999}`, `{a,b}` and wildcards: `"x-{00..02}.tar" -> ["x-00.tar", "x-01.tar", "x-02.tar"]`.

    Raises:
      UserError: the pattern names more than `MAX_SHARDS` shards.
    """
    spans = [(int(first), int(last)) for first, last in RANGE.findall(pattern)]
    if any(first > last for first, last in spans):
        return []
    fits = pattern.count("{") <= MAX_BRACES and all(last - first < MAX_SHARDS for first, last in spans)
    paths = list(itertools.islice(_expanded(pattern), MAX_SHARDS + 1)) if fits else []
    if not fits or len(paths) > MAX_SHARDS:
        raise UserError(
            f"data source `wds:{pattern:.200}` names more than {MAX_SHARDS:,} shards, or has more than {MAX_BRACES} "
            "braces; name the shards that exist"
        )
    return paths


def _expanded(pattern: str) -> Iterator[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        yield from sorted(glob.glob(pattern)) if re.search(r"[*?\[]", pattern) else [pattern]
        return
    options = match[1].split(",")
    if span := RANGE.fullmatch(match[0]):
        first, last = span.groups()
        options = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1))
    for option in options:
        yield from _expanded(pattern[: match.start()] + option + pattern[match.end() :])


class TarShards(Source):
    """The examples of tar shards.

    A record has the first image member's bytes under "image"; `.txt` and `.text`-like members as str, `.json` as the
    parsed value and `.cls` as int, each under its extension; other members as bytes.

    Hidden members, such as `._x.jpg` and `__meta__/info.json`, belong to no record. A key that comes again in its shard
    (`tar -r`) is another record if it has the same members, and else its records are bad: one may be an update of the
    other.
    """

    def __init__(self, pattern: str):
        self.paths = expand(pattern)
        missing = [p for p in self.paths if not os.path.isfile(p)]
        if missing or not self.paths:
            which = "none matches"
            if missing:
                no_file = os.path.exists(missing[0])
                what = f"is a {kind(os.stat(missing[0]).st_mode)}" if no_file else "is missing"
                which = f"`{missing[0]}` {what} ({len(missing)} of {len(self.paths)} are)"
            raise UserError(f"data source `wds:{pattern}`: shard {which}; fix the pattern or fetch the shard again")
        members, firsts, shards = [], [], []
        self.keys: list[str] = []
        self.faulty: dict[int, str] = {}
        self.left_out: Mapping[str, int] = collections.Counter()
        self.stamps: list[tuple[int, int]] = []
        headers = hashlib.blake2b(digest_size=8)
        for number, path in enumerate(self.paths):
            previous, held = None, set()
            records: dict[str, list[int]] = {}
            self.stamps.append(_stamp(os.stat(path)))
            for name, offset, size in scan(path, headers, self.left_out):
                if not _is_member(name):
                    self.left_out["members of no record"] += 1
                    continue
                folder, _, base = name.rpartition("/")
                stem, _, extension = base.partition(".")
                extension = extension.lower()
                key = f"{folder}/{stem}" if folder else stem
                if key != previous or extension in held:
                    records.setdefault(key, []).append(len(firsts))
                    firsts.append(len(members))
                    shards.append(number)
                    self.keys.append(key)
                    previous, held = key, set()
                held.add(extension)
                members.append((extension, offset, size))
            if not records:
                self.left_out["empty shards"] += 1
            self._compare(records, members, firsts)
        self.headers = headers.hexdigest()
        self.firsts = np.asarray([*firsts, len(members)], np.int64)
        self.shards = np.asarray(shards, np.int32)
        self.extensions = sorted({extension for extension, _, _ in members})
        number_of = {extension: n for n, extension in enumerate(self.extensions)}
        self.members = np.asarray([(number_of[e], o, s) for e, o, s in members], np.int64).reshape(-1, 3)

    def _compare(self, records: Mapping[str, list[int]], members: Sequence[tuple], firsts: Sequence[int]) -> None:
        """Notes the records of one shard that share their key and differ in their members."""
        bounds = [*firsts, len(members)]
        for numbers in records.values():
            if len(numbers) > 1:
                held = [{e for e, _, _ in members[bounds[i] : bounds[i + 1]]} for i in numbers]
                if any(one != held[0] for one in held):
                    self.faulty |= dict.fromkeys(
                        numbers, "the key comes again with other members; write the shard anew"
                    )

    def __len__(self) -> int:
        return len(self.shards)

    def key(self, i: int) -> str:
        return f"{os.path.basename(self.paths[self.shards[i]])}/{self.keys[i]}"

    def fingerprint(self) -> str:
        return self.headers

    def __getitem__(self, i: int) -> dict[str, Any]:
        if i in self.faulty:
            raise BadExample(self.faulty[i], "row")
        members = self.members[self.firsts[i] : self.firsts[i + 1]].tolist()
        start, stop = members[0][1], members[-1][1] + members[-1][2]
        if stop - start > MAX_BYTES:
            raise BadExample(f"has {stop - start:,} bytes, more than {MAX_BYTES:,}", "file")
        shard = self.shards[i]
        try:
            with open(self.paths[shard], "rb", buffering=0) as file:
                if _stamp(os.fstat(file.fileno())) != self.stamps[shard]:
                    raise BadExample("the shard was written to after it was opened; start again", "file")
                data = os.pread(file.fileno(), stop - start, start)
        except OSError as error:
            raise BadExample(f"{self.paths[shard]}: {error.strerror}", "file") from None
        record = {}
        for number, offset, size in members:
            extension = self.extensions[number]
            value = data[offset - start : offset - start + size]
            if extension in IMAGE_EXTENSIONS:
                record.setdefault("image", value)
            else:
                record[extension] = _decode(extension, value)
        return record


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _is_member(name: str) -> bool:
    """Whether a member belongs to a record: it has an extension, and is no file of an operating system or a tool."""
    parts = name.split("/")
    return "." in parts[-1] and parts[-1] not in ("Thumbs.db", "desktop.ini") and not any(map(_is_hidden, parts))


def _is_hidden(part: str) -> bool:
    dotted = part.startswith(".") and part not in (".", "..")
    return dotted or part == "__MACOSX" or (part.startswith("__") and part.endswith("__"))


def _decode(extension: str, value: bytes) -> Any:
    kind = extension.rsplit(".", 1)[-1]
    try:
        if kind in ("txt", "text", "transcript", "caption"):
            return value.decode()
        if kind == "json":
            return parse_json(value)
        if kind in ("cls", "cls2", "index", "inx", "id"):
            return int(value)
    except (ValueError, BadExample) as error:
        raise BadExample(f"member .{extension} cannot be read: {error}", "row") from None
    return value
