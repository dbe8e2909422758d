"""Blocks of remote files on disk, of a bounded size together, shared by the threads and processes of a host.

A block's file holds its bytes and their checksum; its name is a hash of the URL, the stamp and the place, so that a
changed file has other blocks. A block is fetched once: who wants it waits for who fetches it.
"""

import collections
import contextlib
import errno
import fcntl
import functools
import logging
import math
import os
import re
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

from vlm_jax.data import remote
from vlm_jax.data.confined import digest
from vlm_jax.data.stamp import Stamp
from vlm_jax.errors import StoreError, UserError

log = logging.getLogger(__name__)
SIZE_GB, BLOCK_MB = 16.0, 2.0
BLOCK_MB_MOST = 16.0
SHARE = 16  # of the cache that a process writes between two looks at the whole
FRESH = 60.0  # seconds for which a file's stamp is known
LOCKS = 1024  # files that fetching processes lock
SUM = 4  # bytes of a checksum
KNOWN = 2**14  # blocks that a process remembers, and that it plans ahead
NAME = re.compile(r"[0-9a-f]{14}(\.[0-9.]+\.tmp)?$")  # of a block in its folder; other files are left alone
FULL = (errno.ENOSPC, errno.EDQUOT)


def of_user() -> Path:
    """Returns the user's folder of copies of remote files."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "vlm_jax"


class Cache:
    """The blocks of remote files in a folder; picklable.

    Args:
      folder: holds the folder `blocks`; None for the user's cache.
      size_gb: of all blocks together, in 10^9 bytes.
      block_mb: of one block, in 2^20 bytes, from 1 to 16; 0 keeps nothing and asks for the bytes of a record alone.
    """

    def __init__(self, folder: str | None = None, size_gb: float = SIZE_GB, block_mb: float = BLOCK_MB):
        self.folder = (Path(folder).expanduser().absolute() if folder else of_user()) / "blocks"
        self.size, self.block = int(size_gb * 10**9), int(block_mb * 2**20)
        if self.block and not 1 <= block_mb <= BLOCK_MB_MOST:
            raise UserError(f"block_mb={block_mb:g}; expected 1 to {BLOCK_MB_MOST:g}, or 0 to keep no blocks")
        if self.block and self.size < 4 * self.block:
            raise UserError(f"cache_gb={size_gb:g} holds no four blocks of block_mb={block_mb:g}; give the cache more")
        self._begin()
        if self.block:
            with self._alone(0):  # can the folder be written?
                pass

    @classmethod
    def of(cls, options: Mapping[str, str]) -> Self:
        """Returns the cache of a URI's options `cache` (the folder), `cache_gb` and `block_mb`."""
        numbers = {}
        for name, argument in (("cache_gb", "size_gb"), ("block_mb", "block_mb")):
            if name in options:
                try:
                    numbers[argument] = float(options[name])
                    if not math.isfinite(numbers[argument]) or numbers[argument] < 0:
                        raise ValueError
                except ValueError:
                    raise UserError(f"{name}={options[name]!r:.40}; expected a number, such as {name}=8") from None
        return cls(options.get("cache"), **numbers)

    def _begin(self) -> None:
        self._stamps: dict[str, tuple[float, Stamp]] = {}
        self._sound: set[str] = set()  # blocks whose checksums this process has compared
        self._written = self.size  # so that the first block looks at the whole

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._begin()

    def open(self, path: str) -> "Cached":
        return Cached(self, path)

    def stamp(self, path: str) -> Stamp:
        """Returns a file's stamp, at most `FRESH` seconds old."""
        seen, stamp = self._stamps.get(path, (-FRESH, None))
        if stamp is None or time.monotonic() - seen > FRESH:
            stamp = remote.stamp_of(path)
            self._stamps[path] = time.monotonic(), stamp
        return stamp

    def read(self, path: str, stamp: Stamp, start: int, length: int) -> bytes:
        """Returns the bytes of a file from `start`: `length`, or fewer if the file ends before."""
        end = min(start + length, stamp.size)
        if start >= end:
            return b""
        if not self.block:
            return remote.fetch(path, start, end - start)
        parts = []
        for number in range(start // self.block, (end - 1) // self.block + 1):
            first = number * self.block
            parts.append(self._part(path, stamp, number, max(start - first, 0), min(end - first, self.block)))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def soon(self, path: str, start: int, length: int, next_: bool) -> None:
        """Fetches the blocks of these bytes in the background, before all others if they are read `next_`."""
        if self.block and length > 0:
            for number in range(start // self.block, (start + length - 1) // self.block + 1):
                _ahead().put((self, path, number), next_)

    def _part(self, path: str, stamp: Stamp, number: int, start: int, end: int) -> bytes:
        """Returns bytes of a block, from the disk or else from the store."""
        name, size = self._name(path, stamp, number), min(self.block, stamp.size - number * self.block)
        data = self._kept(name, size, start, end)
        if data is not None:
            return data
        with self._alone(int(name[-16:], 16)):
            data = self._kept(name, size, start, end)
            if data is None:
                data = self._fetched(path, number, name, size, None)[start:end]
        return data

    def fetch(self, path: str, number: int) -> None:
        """Fetches a block unless it is here."""
        stamp = self.stamp(path)
        size = min(self.block, stamp.size - number * self.block)
        name = self._name(path, stamp, number)
        if size > 0 and not self._is_here(name, size):
            with self._alone(int(name[-16:], 16)):
                if not self._is_here(name, size):
                    self._fetched(path, number, name, size, 0.0)

    def _fetched(self, path: str, number: int, name: str, size: int, patience: float | None) -> bytes:
        data = remote.fetch(path, number * self.block, size, patience)
        with self._told():
            try:
                self._write(name, data)
            except OSError as error:
                if error.errno not in FULL:
                    raise
                self._trim(self._total() // 2)  # others fill the disk
                self._write(name, data)
        return data

    def _name(self, path: str, stamp: Stamp, number: int) -> str:
        return digest(path.encode(), b"%d %d %d %d" % (*stamp, self.block, number))

    def _path(self, name: str) -> str:
        return f"{self.folder}/{name[:2]}/{name[2:]}"

    def _is_here(self, name: str, size: int) -> bool:
        with contextlib.suppress(OSError):
            return os.stat(self._path(name)).st_size == size + SUM
        return False

    def _kept(self, name: str, size: int, start: int, end: int) -> bytes | None:
        """Returns bytes of a block on disk; None if it is not there, or damaged."""
        try:
            descriptor = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            if name in self._sound:
                data = os.pread(descriptor, end - start, start)
                return data if len(data) == end - start else None
            whole = os.pread(descriptor, size + SUM + 1, 0)
            if len(whole) != size + SUM or zlib.crc32(whole[:size]) != int.from_bytes(whole[size:], "little"):
                return None
            if len(self._sound) > KNOWN:
                self._sound.clear()
            self._sound.add(name)
            return whole[start:end]
        except OSError:
            return None
        finally:
            os.close(descriptor)

    def _write(self, name: str, data: bytes) -> None:
        self._written += len(data)
        if self._written > self.size // SHARE:
            self._written = 0
            self._trim(self.size - self.size // 4)
        path = self._path(name)
        temporary = f"{path}.{os.getpid()}.{threading.get_ident()}.tmp"
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(data)
                file.write(zlib.crc32(data).to_bytes(SUM, "little"))
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                os.remove(temporary)

    def _blocks(self) -> list[tuple[int, int, str]]:
        """Returns (time, bytes, path) of each block, the oldest first."""
        found = []
        for folder in os.scandir(self.folder):
            if len(folder.name) == 2 and folder.is_dir(follow_symlinks=False):
                for entry in filter(lambda entry: NAME.match(entry.name), os.scandir(folder.path)):
                    with contextlib.suppress(OSError):  # removed by another process
                        status = entry.stat(follow_symlinks=False)
                        found.append((status.st_mtime_ns, status.st_size, entry.path))
        return sorted(found)

    def _total(self) -> int:
        return sum(size for _, size, _ in self._blocks())

    def _trim(self, most: int) -> None:
        """Removes the oldest blocks until there are at most so many bytes."""
        blocks = self._blocks()
        total = sum(size for _, size, _ in blocks)
        for _, size, path in blocks:
            if total <= most:
                break
            with contextlib.suppress(OSError):
                os.remove(path)
            total -= size

    @contextlib.contextmanager
    def _alone(self, number: int) -> Iterator[None]:
        """Holds one of the locks, which other threads and processes wait for."""
        with self._told():
            self.folder.mkdir(parents=True, exist_ok=True)
            file = open(self.folder / f"lock{number % LOCKS:04d}", "ab")  # noqa: SIM115
        with file:
            with contextlib.suppress(OSError):  # a file system without locks: a block may be fetched twice
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"the cache of blocks, `{self.folder}`, cannot be written ({error.strerror}); free space there, or end "
                "the URI with ?cache=FOLDER for another folder, ?cache_gb=8 for a smaller one"
            ) from None


class Cached:
    """A remote file whose blocks are kept on disk."""

    def __init__(self, cache: Cache, path: str):
        self._cache, self._path, self.stamp = cache, path, cache.stamp(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        pass

    def read(self, start: int, length: int) -> bytes:
        """Returns the bytes from `start`: `length`, or fewer if the file ends before."""
        return self._cache.read(self._path, self.stamp, start, length)


class _Ahead:
    """Threads that fetch blocks before they are read; they end with the process."""

    def __init__(self, threads: int):
        self._wanted: collections.OrderedDict[tuple[Cache, str, int], None] = collections.OrderedDict()
        self._changed = threading.Condition()
        for _ in range(threads):
            threading.Thread(target=self._work, daemon=True).start()

    def put(self, wanted: tuple[Cache, str, int], next_: bool) -> None:
        with self._changed:
            self._wanted[wanted] = None
            if next_:
                self._wanted.move_to_end(wanted, last=False)
            elif len(self._wanted) > KNOWN:
                self._wanted.popitem()
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._wanted:
                    self._changed.wait()
                (cache, path, number), _ = self._wanted.popitem(last=False)
            with contextlib.suppress(Exception):  # who reads the block meets the error
                cache.fetch(path, number)


@functools.cache
def _ahead() -> _Ahead:
    return _Ahead(remote.AT_ONCE)
