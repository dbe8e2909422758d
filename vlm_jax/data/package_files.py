"""Files inside installed Python packages: `pkg:name/path`, the same path on every machine."""

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path

from vlm_jax.errors import UserError


def locate(path: str | os.PathLike) -> Path:
    """Returns `path` itself, or for "pkg:name/path" the path inside the package `name`; imports nothing.

    Raises:
      UserError: the package is not installed, or the path leaves the package.
    """
    path = os.fspath(path)
    if "\0" in path:
        raise UserError(f"{path!r} holds a NUL; expected a path")
    if not path.startswith("pkg:"):
        return Path(path).expanduser()
    name, _, rest = path.removeprefix("pkg:").partition("/")
    if not all(part.isidentifier() for part in name.split(".")):
        raise UserError(f"{path}: `{name}` is no name of a package; expected pkg:name/path")
    folders: Sequence[str] | None = None
    for part in name.split("."):  # importlib.util.find_spec("a.b") would import, and so run, a
        found = _spec(part, folders)
        if found is None or not found.submodule_search_locations:
            raise UserError(f"{path}: there is no package `{name}`; pip install {name.replace('_', '-')}")
        folders = list(found.submodule_search_locations)
    if os.path.isabs(rest) or ".." in Path(rest).parts:
        raise UserError(f"{path} leaves the package; expected the path of a file inside")
    return Path(folders[0], rest)


def _spec(name: str, folders: Sequence[str] | None) -> ModuleSpec | None:
    """Returns the spec of a package in these folders (None: of the path of imports), without importing."""
    for finder in sys.meta_path:
        if hasattr(finder, "find_spec") and (found := finder.find_spec(name, folders)) is not None:
            return found
    return None
