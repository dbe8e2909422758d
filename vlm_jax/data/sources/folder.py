"""`folder:`: pictures in folders, one folder a class."""

import os
from typing import Any

from vlm_jax.data.confined import digest
from vlm_jax.data.sources.image_files import IMAGE_SUFFIXES, ImageFiles, existing
from vlm_jax.errors import UserError


class Folder(ImageFiles):
    """`path[/split]/class/**/picture.jpg`: fields image, label (index of the class in `classes`), text (its name)."""

    def __init__(self, path: str, split: str | None):
        uri = f"folder:{path}"
        self.root = existing(uri, os.path.join(path, split) if split else path)
        files = sorted(p for p in self.root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise UserError(f"data source `{uri}` has no pictures ({', '.join(IMAGE_SUFFIXES)}) under `{self.root}`")
        self.files = [str(p.relative_to(self.root)) for p in files]
        self.classes = sorted({f.split(os.sep)[0] for f in self.files if os.sep in f})

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> dict[str, Any]:
        name, separator, _ = self.files[i].partition(os.sep)
        record = {"label": self.classes.index(name), "text": name} if separator else {}
        return record | {"image": self.picture(self.root, self.files[i])} if self.with_image else record

    def key(self, i: int) -> str:
        return self.files[i]

    def fingerprint(self) -> str:
        return digest(*map(os.fsencode, self.files))
