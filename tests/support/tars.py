"""Tar shards for tests."""

import io
import os
import tarfile

from tests.support.records import red


def write(path, *members, format=tarfile.USTAR_FORMAT, mtime=1, encoding="utf-8", end=True):
    """Writes members (name, bytes) in this order; without `end`, as a writer that was killed leaves them."""
    with tarfile.open(path, "w", format=format, encoding=encoding) as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(data), mtime
            tar.addfile(entry, io.BytesIO(data))
        written = tar.offset
    if not end:
        os.truncate(path, written)


def plain(first, count=3):
    return [(f"{i:05d}.{e}", d) for i in range(first, first + count) for e, d in (("png", red(i)), ("txt", b"%d" % i))]
