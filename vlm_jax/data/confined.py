"""Files that a data set names: regular files only, inside their folder, of a size that fits into memory."""

import functools
import hashlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from vlm_jax.data.source import BadExample
from vlm_jax.errors import UserError

MAX_BYTES = 2**29  # of one picture's file
EDGE_BYTES = 2**14  # of a file's head and tail, for its fingerprint
KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}


def kind(mode: int) -> str:
    """Returns what a file that is not a regular file is, by its `st_mode`."""
    return KINDS.get(stat.S_IFMT(mode), "socket")


def regular(uri: str, path: str | os.PathLike) -> Path:
    """Returns the path of a regular file of the source `uri`; raises UserError if there is none. Opens nothing."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        raise UserError(f"data source `{uri}`: there is no `{path}`") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"data source `{uri}`: `{path}` is a {kind(mode)}; expected a file")
    return Path(path)


def read(root: str | os.PathLike, name: str, allow_outside: bool = False) -> bytes:
    """Returns the bytes of the file `name` of the folder `root`.

    Raises:
      BadExample: there is no such file, it is no regular file or too large, or it is outside of `root`, by its path or
        by a symbolic link, and `allow_outside` is False.
    """
    try:
        path = os.path.join(root, name)
        inside = allow_outside or _is_inside(root, os.path.dirname(path))
        status = os.lstat(path) if inside else None
        if status and stat.S_ISLNK(status.st_mode):
            inside = allow_outside or _is_inside(root, path)
            status = os.stat(path) if inside else None
        if not inside:
            raise BadExample(
                f"`{name}` is outside of {os.path.abspath(root)}; move it inside, or allow it by `?allow_outside` at "
                "the end of the data set's URI",
                "file",
            )
        if not stat.S_ISREG(status.st_mode):
            raise BadExample(f"{path} is a {kind(status.st_mode)}; expected a file", "file")
        if status.st_size > MAX_BYTES:
            raise BadExample(f"{path} has {status.st_size:,} bytes, more than {MAX_BYTES:,}", "file")
        with open(path, "rb", buffering=0) as file:
            return file.readall()
    except OSError as error:
        raise BadExample(f"{path}: {error.strerror}", "file") from None
    except ValueError:  # NUL, or half a surrogate pair
        raise BadExample(f"{name!r} is no path", "file") from None


@functools.lru_cache(maxsize=2**14)
def _is_inside(root: str, path: str) -> bool:
    """Whether a path is inside of the folder once symbolic links are followed."""
    root, path = os.path.realpath(root), os.path.realpath(path)
    return os.path.commonpath((root, path)) == root


def digest(*parts: bytes) -> str:
    """Returns a short hash of some bytes."""
    found = hashlib.blake2b(digest_size=8)
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()


def fingerprint(paths: Iterable[str | os.PathLike]) -> str:
    """Returns a short hash of files' sizes, heads and tails: cheap, and blind to a change in the middle."""
    parts = []
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            head, tail = (
                os.pread(file.fileno(), EDGE_BYTES, 0),
                os.pread(file.fileno(), EDGE_BYTES, max(size - EDGE_BYTES, 0)),
            )
        parts += [size.to_bytes(8, "little"), head, tail]
    return digest(*parts)
