"""`wds:`: tar shards as img2dataset and the `webdataset` package write them, read by index.

Members named `key.ext` that follow each other with the same key are one example. `vlm-jax index` reads the headers of
all shards once, and every run maps what it wrote; of a small set, every run reads the headers. An example is then one
read of the bytes between its first and last member.
"""

import bisect
import concurrent.futures
import contextlib
import itertools
import logging
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.data import storage
from vlm_jax.data.confined import MAX_BYTES, digest, kind
from vlm_jax.data.source import BadExample, Source
from vlm_jax.data.sources import index_copy, tar_index
from vlm_jax.data.sources.image_files import IMAGE_SUFFIXES
from vlm_jax.data.sources.table import parse_json
from vlm_jax.data.sources.tar_columns import NO_RECORD, joined, read_shard, starts
from vlm_jax.data.sources.tar_headers import BLOCK, OTHERS
from vlm_jax.data.storage import Stamp, open_file, stamps_of
from vlm_jax.errors import UserError

MAX_SHARDS = 10**6
MAX_BRACES = 16
# Larger sets need an index: reading their headers takes minutes, in every process of every run.
SCANNED_SHARDS, SCANNED_BYTES, FETCHED_BYTES = 1000, 10**11, 10**10
THREADS = 8
HELD_READS = 1000  # after as many, the mapped pages of the index are given back: about 200 MB
IMAGE_EXTENSIONS = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)
OPTIONS = re.compile(r"[?&](index|cache|cache_gb|block_mb)=")
DIFFERS = "the key comes again with other members; write the shard anew"

log = logging.getLogger(__name__)
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
        yield from storage.glob(pattern) if _has_wildcards(pattern) else [pattern]
        return
    options = match[1].split(",")
    if span := RANGE.fullmatch(match[0]):
        first, last = span.groups()
        options = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1))
    for option in options:
        yield from _expanded(pattern[: match.start()] + option + pattern[match.end() :])


def _has_wildcards(pattern: str) -> bool:
    return bool(re.search(r"[*\[]" if pattern.startswith("http") else r"[*?\[]", pattern))  # in a link, ? is a part


class TarShards(Source):
    """The examples of tar shards.

    A record has the first image member's bytes under "image"; `.txt` and `.text`-like members as str, `.json` as the
    parsed value and `.cls` as int, each under its extension; other members as bytes.

    Hidden members, such as `._x.jpg` and `__meta__/info.json`, belong to no record. A key that comes again in its shard
    (`tar -r`) is another record if it has the same members, and else its records are bad: one may be an update of the
    other.

    Args:
      pattern: the shards, see `expand`, on disk or in a store. Options follow, `?NAME=VALUE&NAME=VALUE`: `index`, the
        folder of their index, which is looked for beside them; of shards in a store `cache`, `cache_gb` and `block_mb`,
        see `block_cache.Cache`.
    """

    def __init__(self, pattern: str):
        self.uri = f"wds:{pattern}"
        self.paths, base, folder, options = located(pattern)
        self.remote = storage.is_remote(self.paths[0])
        cache = {name: value for name, value in options.items() if name != "index"}
        if cache and not self.remote:
            raise UserError(
                f"data source `{self.uri}`: `{next(iter(cache))}` is an option of shards in a store; leave it out"
            )
        self.cache = storage.Cache.of(cache) if self.remote else None
        given = "index" in options
        self.folder = index_copy.fetched(folder, given) if storage.is_remote(folder) else folder
        found = tar_index.read(self.folder)
        if given and found is None:
            raise UserError(f"data source `{self.uri}`: there is no index `{folder}`; {self._advice()}")
        names = [path[len(base) :] for path in self.paths]
        lacking = None if found is None else next((name for name in names if name not in found.numbers), None)
        if lacking is not None:
            why = found.broken.get(lacking, f"index `{folder}` lacks shard `{base + lacking}`")
            if given or len(names) > SCANNED_SHARDS or lacking in found.broken:
                raise UserError(f"data source `{self.uri}`: {why}; {self._advice()}")
            log.warning("%s; the headers of all %d shards are read", why, len(names))
        self.maps, self.reads = (), 0
        self.generation = None if lacking is not None or found is None else found.generation
        if self.generation is None:
            stamps = check_there(self.uri, self.paths)
            self._check_small(sum(stamp.size for stamp in stamps))
            with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
                self.columns = joined(list(threads.map(read_shard, self.paths)))
            rows = slice(None)
        else:
            self.columns, self.maps, rows = found.columns, found.maps, [found.numbers[name] for name in names]
        first, shards = starts(self.columns.shards), self.columns.shards[rows]
        self.first = list(zip(*(column[rows].tolist() for column in first), strict=True))
        self.starts = [0, *np.cumsum(shards["records"]).tolist()]
        self.stamps = [*zip(shards["size"].tolist(), shards["version"].tolist(), strict=True)]
        self.digest = digest(*(value.tobytes() for value in shards["digest"]))
        left_out = {
            NO_RECORD: shards["no_record"].sum(),
            "empty shards": (shards["records"] == 0).sum(),
            OTHERS: shards["others"].sum(),
        }
        self.left_out: Mapping[str, int] = {what: int(count) for what, count in left_out.items() if count}
        self.changed: set[int] = set()

    def _advice(self) -> str:
        return f"write it by: vlm-jax index {shlex.quote(self.uri)}"

    def _check_small(self, size: int) -> None:
        most = FETCHED_BYTES if self.remote else SCANNED_BYTES
        if len(self.paths) > SCANNED_SHARDS or size > most:
            raise UserError(
                f"data source `{self.uri}` has {len(self.paths):,} shards of {size / 1e9:,.0f} GB and no index; "
                f"without one, at most {SCANNED_SHARDS:,} shards of {most / 1e9:,.0f} GB are read: {self._advice()}"
            )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ if self.generation is None else self.__dict__ | {"columns": None, "maps": None}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        if self.columns is None:
            found = tar_index.read(self.folder, self.generation)
            self.columns, self.maps = found.columns, found.maps

    def __len__(self) -> int:
        return self.starts[-1]

    def key(self, i: int) -> str:
        shard = bisect.bisect_right(self.starts, i) - 1
        bounds, _, keys = self.first[shard]
        at = bounds + i - self.starts[shard]
        start, stop = self.columns.bounds[at : at + 2, 1].tolist()
        key = self.columns.keys[keys + start : keys + stop].tobytes().decode("utf-8", "surrogateescape")
        return f"{os.path.basename(self.paths[shard])}/{key}"

    def fingerprint(self) -> str:
        return self.digest

    def __getitem__(self, i: int) -> dict[str, Any]:
        self.reads += 1
        if self.reads % HELD_READS == 0:
            tar_index.release(self.maps)
        shard, members, differs = self._members(i)
        if differs:
            raise BadExample(DIFFERS, "row")
        start, size = span(members)
        if size > MAX_BYTES:
            raise BadExample(too_large(size), "file")
        try:
            with open_file(self.paths[shard], self.cache) as file:
                if file.stamp != self.stamps[shard]:
                    raise BadExample(self._changed(shard), "file")
                data = file.read(start, size)
        except OSError as error:  # not of a lost connection, see `remote`
            raise BadExample(f"{self.paths[shard]}: {error.strerror}", "file") from None
        return record_of(cut(data, start, members, self.columns.extensions))

    def _members(self, i: int) -> tuple[int, list[list[int]], int]:
        """Returns a record's shard, the rows of its members, and whether its key comes again with other members."""
        shard = bisect.bisect_right(self.starts, i) - 1
        bounds, first, _ = self.first[shard]
        at = bounds + i - self.starts[shard]
        (start, _, differs), (stop, _, _) = self.columns.bounds[at : at + 2].tolist()
        return shard, self.columns.members[first + start : first + stop].tolist(), differs

    def soon(self, numbers: Iterable[int], next_: bool = False) -> None:
        if not self.remote:
            return
        with contextlib.suppress(IndexError):  # of a damaged index: who reads the record meets the error
            self._soon(numbers, next_)

    def _soon(self, numbers: Iterable[int], next_: bool) -> None:
        for first, last in self._runs(numbers):
            shard, members, _ = self._members(first)
            start, size = span(members)
            if last > first:
                begin, more = span(self._members(last)[1])
                size = begin + more - start
            self.cache.soon(self.paths[shard], start, min(size, MAX_BYTES), next_)

    def warn_of_window(self, count: int) -> None:
        total = sum(size for size, _ in self.stamps)
        needed = min(2 * count * total // max(len(self), 1), total)
        if self.remote and needed > self.cache.size:
            log.warning(
                "%s: two windows of the order have %.1f GB, and the cache %.1f: blocks will be fetched more than once; "
                "end the URI with ?cache_gb=%d, or give `order` a smaller window",
                self.uri, needed / 1e9, self.cache.size / 1e9, -(-5 * needed // 4 // 10**9),
            )  # fmt: skip

    def _runs(self, numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
        """Yields (first, last) of records that follow each other in a shard: of a range, else one by one."""
        if not isinstance(numbers, range):
            yield from ((i, i) for i in numbers)
            return
        first = numbers.start
        while first < numbers.stop:
            last = min(self.starts[bisect.bisect_right(self.starts, first)], numbers.stop) - 1
            yield first, last
            first = last + 1

    def _changed(self, shard: int) -> str:
        if self.generation is None:
            return "the shard was written to after it was opened; start again"
        if shard not in self.changed:
            self.changed.add(shard)
            log.warning("shard %s has changed since its index was written; %s", self.paths[shard], self._advice())
        return "the shard has changed since its index was written"


def span(members: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Returns the first byte and the number of bytes from a record's first member to its last, rows of `Columns`."""
    start = members[0][1] * BLOCK
    return start, members[-1][1] * BLOCK + members[-1][2] - start


def too_large(size: int) -> str | None:
    """Returns what is wrong with a record of so many bytes, None if nothing is."""
    return f"has {size:,} bytes, more than {MAX_BYTES:,}" if size > MAX_BYTES else None


def cut(
    data: bytes, start: int, members: Iterable[Sequence[int]], extensions: Sequence[str]
) -> list[tuple[str, bytes]]:
    """Returns (extension, bytes) of a record's members, of its bytes, which begin at byte `start` of the shard."""
    return [(extensions[e], data[block * BLOCK - start : block * BLOCK - start + size]) for e, block, size in members]


def record_of(members: Iterable[tuple[str, bytes]]) -> dict[str, Any]:
    """Returns the record of members, (extension, bytes) each; raises BadExample if one cannot be read."""
    record = {}
    for extension, value in members:
        if extension in IMAGE_EXTENSIONS:
            record.setdefault("image", value)
        else:
            record[extension] = _decode(extension, value)
    return record


def located(pattern: str) -> tuple[list[str], str, str, dict[str, str]]:
    """Returns the paths of shards, what they begin with (a folder and "/", or nothing), their index's folder, options.

    Raises:
      UserError: the pattern names no shard.
    """
    shards, *given = OPTIONS.split(pattern)
    shards, options = storage.local(shards), dict(zip(given[::2], given[1::2], strict=True))
    paths, base = expand(shards), re.match(r"(?:[^{*?\[]*/)?", shards)[0]
    if not paths:
        raise UserError(f"data source `wds:{pattern}`: shard none matches; fix the pattern or fetch the shard again")
    folder = os.path.expanduser(storage.local(options.get("index", ""))) or os.path.join(base, tar_index.FOLDER)
    return paths, base, folder, options


def check_there(uri: str, paths: Sequence[str]) -> list[Stamp]:
    """Returns the stamps of files; raises UserError if there is no file at one of the paths."""
    stamps = stamps_of(paths)
    if missing := [path for path, stamp in zip(paths, stamps, strict=True) if stamp is None]:
        there = not storage.is_remote(missing[0]) and os.path.exists(missing[0])
        what = f"is a {kind(os.stat(missing[0]).st_mode)}" if there else "is missing"
        raise UserError(
            f"data source `{uri}`: shard `{missing[0]}` {what} ({len(missing)} of {len(paths)} are); fix the pattern "
            "or fetch the shard again"
        )
    return stamps


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
