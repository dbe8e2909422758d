"""Files of a data set, on disk or in a store: a stamp that changes with a file, and bytes from anywhere in it.

All data is read through here. URLs (`s3://`, `gs://`, `https://`, ...) need the packages of the extra `remote`.
"""

import glob as glob_lib
import os
import stat
from collections.abc import Iterable
from typing import Self

from vlm_jax.data import remote
from vlm_jax.data.block_cache import Cache, Cached
from vlm_jax.data.stamp import Stamp, is_remote


class File:
    """An open file, closed by `with`."""

    def __init__(self, path: str):
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO blocks nobody

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        os.close(self._descriptor)

    @property
    def stamp(self) -> Stamp:
        return _stamp(os.fstat(self._descriptor))

    def read(self, start: int, length: int) -> bytes:
        """Returns the bytes from `start`: `length`, or fewer if the file ends before."""
        return os.pread(self._descriptor, length, start)


def local(path: str) -> str:
    """Returns the path of `file:///path`; another path as it is."""
    return path.removeprefix("file://") if path.startswith("file://") else path


def open_file(path: str, cache: Cache | None = None) -> File | remote.Stream | Cached:
    """Opens a file. A URL is read once from front to back, or in any order by a `cache`, which keeps blocks on disk."""
    if not is_remote(path):
        return File(path)
    if cache is not None:
        return cache.open(path)
    return remote.Stream(path)


def stamp_of(path: str) -> Stamp:
    """Returns the stamp of a file; raises OSError if there is none."""
    if is_remote(path):
        return remote.stamp_of(path, remote.OPENING)
    return _stamp(os.stat(path))


def stamps_of(paths: Iterable[str]) -> list[Stamp | None]:
    """Returns the stamps of files, None where there is no regular file: URLs by listings, or many at a time."""
    paths = list(paths)
    if paths and is_remote(paths[0]):
        return remote.stamps_of(paths)
    return [_stamp_or_none(path) for path in paths]


def glob(pattern: str) -> list[str]:
    """Returns the paths that match wildcards, sorted."""
    if is_remote(pattern):
        return remote.glob(pattern)
    return sorted(glob_lib.glob(pattern))


def _stamp_or_none(path: str) -> Stamp | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return _stamp(status) if stat.S_ISREG(status.st_mode) else None


def _stamp(status: os.stat_result) -> Stamp:
    return Stamp(status.st_size, status.st_mtime_ns)
