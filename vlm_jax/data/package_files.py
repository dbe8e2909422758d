"""Files inside installed Python packages: `pkg:name/path`, the same path on every machine."""

import importlib.util
import os
from pathlib import Path

from vlm_jax.errors import UserError


def locate(path: str | os.PathLike) -> Path:
    """Returns `path` itself, or for "pkg:name/path" the path inside the package `name`.

    Raises:
      UserError: the package is not installed.
    """
    path = os.fspath(path)
    if not path.startswith("pkg:"):
        return Path(path).expanduser()
    name, _, rest = path.removeprefix("pkg:").partition("/")
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise UserError(f"{path}: there is no package `{name}`; pip install {name.replace('_', '-')}")
    return Path(found.submodule_search_locations[0], rest)
