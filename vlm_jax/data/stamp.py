"""The stamp of a file, and which paths are URLs."""

import os
import re
from typing import NamedTuple

URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")


class Stamp(NamedTuple):
    """What a file's contents are known by, without reading the file.

    Attributes:
      size: bytes.
      version: modification time in ns; of a store, a hash of the etag.
    """

    size: int
    version: int


def is_remote(path: str | os.PathLike) -> bool:
    """Returns whether a path is a URL."""
    return isinstance(path, str) and URL.match(path) is not None
