"""Records whose pictures are separate files."""

import copy
from pathlib import Path
from typing import Self

from vlm_jax.data.source import BadExample, Source
from vlm_jax.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class ImageFiles(Source):
    """A source that opens a record's picture only if `with_image`, which `narrow` switches off."""

    with_image = True

    def narrow(self, paths: frozenset[str]) -> Self:
        if "image" in paths:
            return self
        narrowed = copy.copy(self)
        narrowed.with_image = False
        return narrowed


def existing(uri: str, path: str) -> Path:
    """Returns the path of the source `uri`; raises UserError if there is no such file or folder."""
    if not Path(path).exists():
        raise UserError(f"data source `{uri}`: there is no `{path}`")
    return Path(path)


def read(path: Path) -> bytes:
    """Returns the bytes of a picture's file; raises BadExample if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadExample(f"{path}: {error.strerror}") from None
