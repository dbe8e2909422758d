"""Files of a data set: a stamp that changes with a file, and bytes from anywhere in it.

Files are local. A store needs `open_file` and `stamp_of` alone: all else reads through them.
"""

import os
from typing import NamedTuple, Self


class Stamp(NamedTuple):
    """What a file's contents are known by, without reading the file.

    Attributes:
      size: bytes.
      version: modification time in ns; of a store, a hash of the etag.
    """

    size: int
    version: int


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


open_file = File


def stamp_of(path: str) -> Stamp:
    """Returns the stamp of a file; raises OSError if there is none."""
    return _stamp(os.stat(path))


def _stamp(status: os.stat_result) -> Stamp:
    return Stamp(status.st_size, status.st_mtime_ns)
