"""The headers of a tar file, read without its contents."""

import logging
import os
from collections.abc import Iterator
from typing import Any

from vlm_jax.errors import UserError

log = logging.getLogger(__name__)
BLOCK = 512
MAX_FIELDS = 2**20  # bytes of a member's pax records, or of its name
REGULAR = (b"0", b"\0", b"7")
OTHERS = "links, devices and sparse members"
BODILESS = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, FIFOs: no content follows, as in `tarfile`


def scan(path: str, headers: Any = None, left_out: dict[str, int] | None = None) -> Iterator[tuple[str, int, int]]:
    """Yields (name, offset, size) of a tar file's regular members, reading only headers.

    Reads POSIX 1003.1 pax and GNU names. Bytes of a name that are not UTF-8 become surrogates, so that names
    stay distinct.

    Args:
      path: the file.
      headers: a hash of hashlib, updated by the headers and the first 512 bytes of regular members.
      left_out: what is no regular member (links, devices) -> their number, added to.

    Raises:
      UserError: the file is compressed, not a tar file, damaged, or cut short.
    """
    left_out = {} if left_out is None else left_out
    with open(path, "rb", buffering=0) as file:
        total = os.fstat(file.fileno()).st_size
        at, override = 0, {}
        while at < total:
            block = os.pread(file.fileno(), 2 * BLOCK, at)
            header = block[:BLOCK]
            if at == 0 and header[:2] == b"\x1f\x8b":
                raise UserError(f"shard `{path}` is compressed; unpack it with gunzip, random access needs plain tar")
            if not header.strip(b"\0"):
                return
            if len(header) == BLOCK and not _is_header(header):
                raise UserError(f"shard `{path}` is not a tar file: no header at byte {at}; fetch it again")
            kind = header[156:157]
            try:
                size = 0 if kind in BODILESS or len(header) < BLOCK else _number(header[124:136])
                if kind in REGULAR and "size" in override:
                    size = _decimal(override["size"])
            except ValueError:
                raise UserError(
                    f"shard `{path}` is damaged: no size in the header at byte {at}; fetch it again"
                ) from None
            body, at = at + BLOCK, at + BLOCK + -(-size // BLOCK) * BLOCK
            if at > total:
                raise UserError(f"shard `{path}` is cut short: it has {total} bytes, expected {at}; fetch it again")
            if kind in (b"x", b"L"):  # fields of the next member
                if size > MAX_FIELDS:
                    raise UserError(
                        f"shard `{path}` is damaged: {size:,} bytes of names at byte {body}; fetch it again"
                    )
                content = os.pread(file.fileno(), size, body)
                try:
                    override |= _pax(content) if kind == b"x" else {"path": content.split(b"\0", 1)[0]}
                except ValueError:
                    raise UserError(f"shard `{path}` is damaged: pax records at byte {body}; fetch it again") from None
            elif kind not in (b"g", b"K"):
                if kind in REGULAR:
                    name = override.get("path") or _name(header)
                    if headers is not None:
                        headers.update(name + size.to_bytes(8, "little") + block[: BLOCK + min(size, BLOCK)])
                    yield name.decode("utf-8", "surrogateescape").removeprefix("./"), body, size
                elif kind != b"5":
                    left_out[OTHERS] = left_out.get(OTHERS, 0) + 1
                override = {}
    log.warning("shard %s has no end mark: its writer was stopped, or it is cut short between two members", path)


def _is_header(header: bytes) -> bool:
    """Whether the checksum equals the sum of the bytes, with its own bytes as spaces."""
    try:
        stored = _octal(header[148:156])
    except ValueError:
        return False
    return stored == sum(header) - sum(header[148:156]) + 8 * 32


def _name(header: bytes) -> bytes:
    name, prefix = header[:100].split(b"\0", 1)[0], header[345:500].split(b"\0", 1)[0]
    return prefix + b"/" + name if header[257:263] == b"ustar\0" and prefix else name


def _number(raw: bytes) -> int:
    """Octal text, or base 256 with the top bit set (sizes of 8 GiB and more); raises ValueError."""
    if raw[0] & 0x80:
        if raw[0] & 0x40:
            raise ValueError("negative")
        return int.from_bytes(bytes([raw[0] & 0x7F]) + raw[1:], "big")
    return _octal(raw)


def _octal(raw: bytes) -> int:
    digits = raw.strip(b" \0") or b"0"
    if digits.strip(b"01234567"):
        raise ValueError("not octal")
    return int(digits, 8)


def _decimal(raw: bytes) -> int:
    if not raw.isdigit() or len(raw) > 18:
        raise ValueError("not a size")
    return int(raw)


def _pax(raw: bytes) -> dict[str, bytes]:
    """Path and size of the records `length key=value\\n`; raises ValueError."""
    fields = {}
    while raw:
        length = _decimal(raw.split(b" ", 1)[0])
        record, raw = raw[:length], raw[length:]
        key, equals, value = record.partition(b" ")[2].partition(b"=")
        if len(record) < length or not equals or not value.endswith(b"\n"):
            raise ValueError("not a pax record")
        if key in (b"path", b"size"):
            fields[key.decode()] = value[:-1]
    return fields
