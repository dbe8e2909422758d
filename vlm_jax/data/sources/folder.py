"""`folder:`: pictures in folders, one folder a class."""

import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vlm_jax.data.confined import digest
from vlm_jax.data.source import is_number
from vlm_jax.data.sources.image_files import IMAGE_SUFFIXES, ImageFiles, existing
from vlm_jax.errors import UserError

log = logging.getLogger(__name__)
# Folders that operating systems and servers leave behind; names with a leading dot are hidden, too.
HIDDEN = {"__MACOSX", "__pycache__", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", "System Volume Information"}


class Folder(ImageFiles):
    """`path[/split]/class/**/picture.jpg`: fields image, label, text (the name of the class's folder).

    The classes are the folders with pictures of all splits together, so that a class that one split lacks shifts no
    label. If all names are numbers, a label is the folder's number; otherwise a label is the place among the sorted
    names. Hidden folders and files (`.ipynb_checkpoints`, `._x.jpg`, `__MACOSX`) are no classes and no pictures.

    Attributes:
      classes: the names in the order of the labels.
    """

    def __init__(self, path: str, split: str | None):
        uri = f"folder:{path}"
        self.root = existing(uri, path)
        if split:
            self.root = _of_split(uri, self.root, split)
        self.files = sorted(_pictures(self.root), key=lambda file: file.split(os.sep))
        if not self.files:
            raise UserError(f"data source `{uri}` has no pictures ({', '.join(IMAGE_SUFFIXES)}) under `{self.root}`")
        names = {file.split(os.sep)[0] for file in self.files if os.sep in file}
        if split:
            names.update(name for other in _folders(self.root.parent, links=True) for name in _classes(other))
        self.names = _labelled(names, uri)
        self.labels = {name: label for label, name in self.names.items()}
        self.classes = list(self.names.values())

    def __len__(self) -> int:
        return len(self.files)

    def label_names(self, path: str) -> dict[int, str] | None:
        return self.names if path == "label" and self.names else None

    def __getitem__(self, i: int) -> dict[str, Any]:
        name, separator, _ = self.files[i].partition(os.sep)
        record = {"label": self.labels[name], "text": name} if separator else {}
        return record | {"image": self.picture(self.root, self.files[i])} if self.with_image else record

    def key(self, i: int) -> str:
        return self.files[i]

    def fingerprint(self) -> str:
        return digest(*map(os.fsencode, self.files))


SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}


def holds_splits(path: str) -> bool:
    """Returns whether a folder holds splits: a `train`, or nothing but folders called like splits."""
    names = {folder.name.lower() for folder in _folders(os.path.expanduser(path), links=True)}
    return not names or "train" in names or names <= SPLITS


def _of_split(uri: str, root: Path, split: str) -> Path:
    if not (root / split).exists():
        names = sorted(folder.name for folder in _folders(root, links=True))
        has = f"it has {', '.join(names[:8])}{', ...' if names[8:] else ''}" if names else "it has no folders"
        hint = "" if SPLITS & {name.lower() for name in names} else "; leave the split out if it is no split's folder"
        raise UserError(f"data source `{uri}` has no split `{split}`: there is no `{root / split}`; {has}{hint}")
    return root / split


def _labelled(names: Iterable[str], uri: str) -> dict[int, str]:
    """Label -> name, in the order of the labels."""
    names = sorted(names, key=lambda name: (0, int(name), name) if is_number(name) else (1, 0, name))
    if not all(map(is_number, names)):
        return dict(enumerate(names))
    labelled: dict[int, str] = {}
    for name in names:
        other = labelled.setdefault(int(name), name)
        if other != name:
            raise UserError(f"data source `{uri}`: the folders `{other}` and `{name}` are one number; rename one")
    return labelled


def _pictures(root: Path) -> Iterator[str]:
    """The paths of the pictures under a folder, relative to it; linked folders are not entered."""
    for folder, inner, files in os.walk(root):
        inner[:] = [name for name in inner if not _hidden(name)]
        for name in inner:
            if os.path.islink(os.path.join(folder, name)):
                log.warning("%s is a link to a folder; its pictures are left out", os.path.join(folder, name))
        at = os.path.relpath(folder, root)
        yield from (name if at == "." else os.path.join(at, name) for name in files if _is_picture(name))


def _classes(split: os.PathLike) -> Iterator[str]:
    return (folder.name for folder in _folders(split) if _has_picture(folder))


def _has_picture(folder: os.PathLike) -> bool:
    """Whether there is a picture in a folder; stops at the first one."""
    try:
        with os.scandir(folder) as entries:
            if any(_is_picture(entry.name) and not entry.is_dir() for entry in entries):
                return True
    except OSError:
        return False
    return any(map(_has_picture, _folders(folder)))


def _folders(root: os.PathLike, links: bool = False) -> list[os.DirEntry]:
    """The folders in a folder that are not hidden; with `links`, linked ones, too."""
    try:
        with os.scandir(root) as entries:
            return [entry for entry in entries if entry.is_dir(follow_symlinks=links) and not _hidden(entry.name)]
    except OSError:
        return []


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not _hidden(name)


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in HIDDEN
