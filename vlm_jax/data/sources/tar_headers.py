"""The headers of a tar file, read without its contents."""

import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vlm_jax.data import storage
from vlm_jax.errors import UserError

log = logging.getLogger(__name__)
BLOCK = 512
WINDOW = 2**13  # bytes read at a time: headers of small members are near each other
TOGETHER = 512  # headers whose checksums are compared at once
MAX_FIELDS = 2**20  # bytes of a member's pax records, or of its name
REGULAR, FIELDS, IGNORED, FOLDER = map(frozenset, (b"0\x007", b"xL", b"gK", b"5"))  # kinds of members
BODILESS = frozenset(b"123456")  # links, devices, folders, FIFOs: no content follows, as in `tarfile`
LONE = re.compile(rb"([0-9]{1,9}) (?!path=|size=)[^=\n]+=[^\n]*\n")  # most pax records: a time alone
OTHERS = "links, devices and sparse members"
OCTAL = 8 ** np.arange(5, -1, -1, dtype=np.int32)


def scan(path: str, contents: Any = None, left_out: dict[str, int] | None = None) -> Iterator[tuple[str, int, int]]:
    """Yields (name, offset, size) of a tar file's regular members, reading only headers.

    Reads POSIX 1003.1 pax and GNU names. Bytes of a name that are not UTF-8 become surrogates, so that names
    stay distinct.

    Args:
      path: the file.
      contents: a hash of hashlib, updated by the first 512 bytes of regular members.
      left_out: what is no regular member (links, devices) -> their number, added to.

    Raises:
      UserError: the file is compressed, not a tar file, damaged, or cut short.
    """
    left_out = {} if left_out is None else left_out
    places, blocks, members, hashed = [], [], [], []  # read since checksums were compared
    with storage.open_file(path) as file:
        total = file.stamp.size
        at, override, window, start = 0, {}, b"", 0
        try:
            while at < total:
                place = at - start
                if place + 2 * BLOCK > len(window):
                    window, start, place = file.read(at, WINDOW), at, 0
                header = window[place : place + BLOCK]
                if at == 0 and header[:2] == b"\x1f\x8b":
                    raise UserError(
                        f"shard `{path}` is compressed; unpack it with gunzip, random access needs plain tar"
                    )
                if header < b"\1" and not header.strip(b"\0"):
                    break
                if len(header) < BLOCK:
                    raise _cut(path, total, at + BLOCK)
                places.append(at)
                blocks.append(header)
                kind, digits = header[156], header[124:135]
                try:
                    if kind in BODILESS:
                        size = 0
                    elif kind in REGULAR and "size" in override:
                        size = _decimal(override["size"])
                    elif digits.isdigit() and header[135] in (0, 32):
                        size = int(digits, 8)
                    else:
                        size = _number(header[124:136])
                except ValueError:
                    raise _damaged(path, f"no size in the header at byte {at}") from None
                body, at = at + BLOCK, at + BLOCK + -(-size // BLOCK) * BLOCK
                if at > total:
                    raise _cut(path, total, at)
                if kind in REGULAR:
                    name = override.get("path") or _name(header)
                    members.append((name.decode("utf-8", "surrogateescape").removeprefix("./"), body, size))
                    if contents is not None:
                        hashed.append(window[place + BLOCK : place + BLOCK + min(size, BLOCK)])
                    override = {}
                elif kind in FIELDS:  # fields of the next member
                    if size > MAX_FIELDS:
                        raise _damaged(path, f"{size:,} bytes of names at byte {body}")
                    content = window[place + BLOCK : place + BLOCK + size]
                    content = content if len(content) == size else file.read(body, size)
                    try:
                        if kind == ord("L"):
                            override["path"] = content.split(b"\0", 1)[0]
                        elif not ((lone := LONE.fullmatch(content)) and int(lone[1]) == size):
                            override |= _pax(content)
                    except ValueError:
                        raise _damaged(path, f"pax records at byte {body}") from None
                elif kind not in IGNORED:
                    if kind not in FOLDER:
                        left_out[OTHERS] = left_out.get(OTHERS, 0) + 1
                    override = {}
                if len(blocks) == TOGETHER:
                    _check(path, places, blocks)
                    if contents is not None:
                        contents.update(b"".join(hashed))
                    yield from members
                    for read in (places, blocks, members, hashed):
                        read.clear()
            else:
                log.warning(
                    "shard %s has no end mark: its writer was stopped, or it is cut short between two members", path
                )
        finally:
            _check(path, places, blocks)  # a wrong header comes before the errors that follow from it
        if contents is not None:
            contents.update(b"".join(hashed))
        yield from members


def _damaged(path: str, what: str) -> UserError:
    return UserError(f"shard `{path}` is damaged: {what}; fetch it again")


def _cut(path: str, size: int, expected: int) -> UserError:
    return UserError(f"shard `{path}` is cut short: it has {size} bytes, expected {expected}; fetch it again")


def _check(path: str, places: Sequence[int], headers: Sequence[bytes]) -> None:
    """Raises UserError if the checksum of a header is wrong.

    All are compared at once, as most programs write them: six octal digits, NUL, space. The others follow one by one.
    """
    blocks = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, BLOCK)
    stored = blocks[:, 148:156].astype(np.int32)
    digits = stored[:, :6] - ord("0")
    sound = (digits >> 3 == 0).all(1) & (stored[:, 6] == 0) & (stored[:, 7] == ord(" "))
    sound &= digits @ OCTAL == blocks.sum(1, dtype=np.int32) - stored.sum(1) + 8 * ord(" ")
    for i in np.flatnonzero(~sound).tolist():
        if not _is_header(headers[i]):
            raise UserError(
                f"shard `{path}` is not a tar file: no header at byte {places[i]}; fetch it again"
            ) from None


def _is_header(header: bytes) -> bool:
    """Whether the checksum equals the sum of the bytes, with its own bytes as spaces."""
    try:
        stored = _octal(header[148:156])
    except ValueError:
        return False
    return stored == sum(header) - sum(header[148:156]) + 8 * 32


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    if header[345] and header[257:263] == b"ustar\0":
        return header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name


def _number(raw: bytes) -> int:
    """Octal text, or base 256 with the top bit set (sizes of 8 GiB and more); raises ValueError."""
    if raw[0] & 0x80:
        if raw[0] & 0x40:
            raise ValueError("negative")
        return int.from_bytes(bytes([raw[0] & 0x7F]) + raw[1:], "big")
    return _octal(raw)


def _octal(raw: bytes) -> int:
    digits = raw.strip(b" \0") or b"0"
    if not digits.isdigit():
        raise ValueError("not octal")
    return int(digits, 8)


def _decimal(raw: bytes) -> int:
    if not raw.isdigit() or len(raw) > 18:
        raise ValueError("not a size")
    return int(raw)


def _pax(raw: bytes) -> dict[str, bytes]:
    """Path and size of the records `length key=value\\n`; raises ValueError."""
    fields, at = {}, 0
    while at < len(raw):
        space = raw.find(b" ", at)
        end = at + _decimal(raw[at : max(space, at)])
        key, _, value = raw[space + 1 : end].partition(b"=")
        if end > len(raw) or value[-1:] != b"\n":
            raise ValueError("not a pax record")
        if key in (b"path", b"size"):
            fields[key.decode()] = value[:-1]
        at = end
    return fields
