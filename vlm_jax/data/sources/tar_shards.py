"""`wds:`: tar shards as img2dataset and the `webdataset` package write them, read by index.

Members named `key.ext` that follow each other with the same key are one example. The headers of all shards are
scanned once; an example is then one read of the bytes between its first and last member.
"""

import glob
import json
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from vlm_jax.data.source import BadExample, Source
from vlm_jax.errors import UserError

log = logging.getLogger(__name__)
BLOCK = 512
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


def expand(pattern: str) -> list[str]:
    """Expands `{000..999}`, `{a,b}` and wildcards: `"x-{00..02}.tar" -> ["x-00.tar", "x-01.tar", "x-02.tar"]`."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return sorted(glob.glob(pattern)) if re.search(r"[*?\[]", pattern) else [pattern]
    head, inner, tail = pattern[: match.start()], match[1], pattern[match.end() :]
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", inner):
        first, last = span.groups()
        options = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    else:
        options = inner.split(",")
    return [path for option in options for path in expand(head + option + tail)]


class TarShards(Source):
    """The examples of tar shards.

    A record has the first image member's bytes under "image"; `.txt` and `.text`-like members as str, `.json` as the
    parsed value and `.cls` as int, each under its extension; other members as bytes.
    """

    def __init__(self, pattern: str):
        self.paths = expand(pattern)
        missing = [p for p in self.paths if not os.path.isfile(p)]
        if missing or not self.paths:
            which = (
                f"`{missing[0]}` is missing ({len(missing)} of {len(self.paths)} are)" if missing else "none matches"
            )
            raise UserError(f"data source `wds:{pattern}`: shard {which}; fix the pattern or fetch the shard again")
        members, firsts, shards = [], [], []
        self.keys: list[str] = []
        for number, path in enumerate(self.paths):
            previous = None
            for name, offset, size in scan(path):
                folder, _, base = name.rpartition("/")
                stem, dot, extension = base.partition(".")
                if not dot:
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if key != previous:
                    firsts.append(len(members))
                    shards.append(number)
                    self.keys.append(key)
                    previous = key
                members.append((extension.lower(), offset, size))
        self.firsts = np.asarray([*firsts, len(members)], np.int64)
        self.shards = np.asarray(shards, np.int32)
        self.extensions = sorted({extension for extension, _, _ in members})
        number_of = {extension: n for n, extension in enumerate(self.extensions)}
        self.members = np.asarray([(number_of[e], o, s) for e, o, s in members], np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.shards)

    def key(self, i: int) -> str:
        return f"{os.path.basename(self.paths[self.shards[i]])}/{self.keys[i]}"

    def __getitem__(self, i: int) -> dict[str, Any]:
        members = self.members[self.firsts[i] : self.firsts[i + 1]].tolist()
        start, stop = members[0][1], members[-1][1] + members[-1][2]
        with open(self.paths[self.shards[i]], "rb", buffering=0) as file:
            data = os.pread(file.fileno(), stop - start, start)
        record = {}
        for number, offset, size in members:
            extension = self.extensions[number]
            value = data[offset - start : offset - start + size]
            if extension in IMAGE_EXTENSIONS:
                record.setdefault("image", value)
            else:
                record[extension] = _decode(extension, value)
        return record


def _decode(extension: str, value: bytes) -> Any:
    kind = extension.rsplit(".", 1)[-1]
    try:
        if kind in ("txt", "text", "transcript", "caption"):
            return value.decode()
        if kind == "json":
            return json.loads(value)
        if kind in ("cls", "cls2", "index", "inx", "id"):
            return int(value)
    except ValueError as error:
        raise BadExample(f"member .{extension} cannot be read: {error}") from None
    return value


def scan(path: str) -> Iterator[tuple[str, int, int]]:
    """Yields (name, offset, size) of a tar file's regular members, reading only headers.

    Reads POSIX 1003.1 pax and GNU names.

    Raises:
      UserError: the file is compressed, not a tar file, or cut short.
    """
    with open(path, "rb") as file:
        total = os.fstat(file.fileno()).st_size
        at, override = 0, {}
        while at < total:
            header = os.pread(file.fileno(), BLOCK, at)
            if at == 0 and header[:2] == b"\x1f\x8b":
                raise UserError(f"shard `{path}` is compressed; unpack it with gunzip, random access needs plain tar")
            if not header.strip(b"\0"):
                return
            if len(header) == BLOCK and not _is_header(header):
                raise UserError(f"shard `{path}` is not a tar file: no header at byte {at}; fetch it again")
            size = int(override.get("size") or _number(header[124:136] if len(header) == BLOCK else b"0"))
            body, at = at + BLOCK, at + BLOCK + -(-size // BLOCK) * BLOCK
            if at > total:
                raise UserError(f"shard `{path}` is cut short: it has {total} bytes, expected {at}; fetch it again")
            kind = header[156:157]
            if kind == b"x":  # pax: fields of the next member
                override |= _pax(os.pread(file.fileno(), size, body))
            elif kind == b"L":  # GNU: name of the next member
                override["path"] = os.pread(file.fileno(), size, body).rstrip(b"\0").decode()
            elif kind != b"g":
                if kind in (b"0", b"\0"):
                    name = _text(header[:100])
                    if header[257:263] == b"ustar\0" and header[345]:
                        name = f"{_text(header[345:500])}/{name}"
                    yield override.get("path", name).removeprefix("./"), body, size
                override = {}
    log.warning("shard %s has no end mark: its writer was stopped, or it is cut short between two members", path)


def _is_header(header: bytes) -> bool:
    """Whether the checksum equals the sum of the bytes, with its own bytes as spaces."""
    stored = header[148:156].strip(b"\0 ")
    return stored.isdigit() and int(stored, 8) == sum(header) - sum(header[148:156]) + 8 * 32


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode()


def _number(raw: bytes) -> int:
    """Octal text, or base 256 with the top bit set (sizes of 8 GiB and more)."""
    if raw[0] & 0x80:
        return int.from_bytes(bytes([raw[0] & 0x7F]) + raw[1:], "big")
    return int(raw.strip(b" \0") or b"0", 8)


def _pax(raw: bytes) -> dict[str, str]:
    """Records `length key=value\\n`."""
    fields = {}
    while raw:
        length = int(raw.split(b" ", 1)[0])
        key, _, value = raw[: length - 1].split(b" ", 1)[1].partition(b"=")
        fields[key.decode()] = value.decode(errors="replace")
        raw = raw[length:]
    return {k: v for k, v in fields.items() if k in ("path", "size")}
