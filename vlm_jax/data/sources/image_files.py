"""Records whose pictures are separate files."""

import copy
from pathlib import Path
from typing import Self

from vlm_jax.data import confined
from vlm_jax.data.source import Source
from vlm_jax.errors import UserError

# Endings of pictures that Pillow reads; HEIC needs the package pillow-heif.
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic",
    ".heif", ".jp2", ".ppm", ".pgm",
)  # fmt: skip


class ImageFiles(Source):
    """A source that opens a record's picture only if `with_image`, which `narrow` switches off.

    Pictures outside of the source's folder are bad examples, unless `allow_outside`.
    """

    with_image = True
    allow_outside = False

    def narrow(self, paths: frozenset[str]) -> Self:
        if "image" in paths:
            return self
        narrowed = copy.copy(self)
        narrowed.with_image = False
        return narrowed

    def picture(self, root: Path, name: str) -> bytes:
        """Returns the bytes of the file `name` of the folder `root`; raises BadExample, see `confined.read`."""
        return confined.read(root, name, self.allow_outside)


def existing(uri: str, path: str) -> Path:
    """Returns the path of the source `uri`; raises UserError if there is no such file or folder."""
    if not Path(path).exists():
        raise UserError(f"data source `{uri}`: there is no `{path}`")
    return Path(path)
