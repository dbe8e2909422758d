"""The experiments that come with vlm_jax, by name: `clip:smoke` is `get_config("smoke")` of configs/clip.py."""

import difflib
import re
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder

from absl import flags
from ml_collections import config_flags

from vlm_jax.catalogue import CONFIGS
from vlm_jax.errors import UserError


def names() -> list[str]:
    """Returns the names of the configs in `CONFIGS`. A file without `get_config` only holds parts of other configs."""
    return sorted(path.stem for path in CONFIGS.glob("*.py") if "\ndef get_config(" in path.read_text(encoding="utf-8"))


def locate(spec: str) -> str:
    """Returns "PATH:VARIANT" for "NAME:VARIANT"; returns a path (with a slash or .py) unchanged.

    Raises:
      UserError: no config has this name.
    """
    name, colon, variant = spec.partition(":")
    if not re.fullmatch(r"[\w-]+", name):
        return spec
    known = names()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        listed = f"known: {', '.join(known)}; a file of your own is given by its path, such as {name}.py"
        raise UserError(f"there is no config `{name}`; " + (f"did you mean `{close[0]}`?" if close else listed))
    return f"{CONFIGS / name}.py{colon}{variant}"


def define(name: str, default: str | None, help_text: str, flag_values: flags.FlagValues) -> None:
    """Defines the flag of a config like `config_flags.DEFINE_config_file`, and also accepts names of configs."""
    config_flags.DEFINE_config_file(name, default, help_text, flag_values=flag_values)
    flag_values[name].parser = _Parser(name)


class _Parser(config_flags.config_flags.ConfigFileFlagParser):
    def parse(self, path: str):
        located = locate(path)
        # a config given by name imports its neighbours from its own folder, even if the working directory has `configs`
        finders = [_Neighbours, *sys.meta_path] if located != path else [*sys.meta_path, _Neighbours]
        sys.meta_path[:] = dict.fromkeys(finders)
        return super().parse(located)


class _Neighbours(MetaPathFinder):
    """Finds `configs` and its modules in `CONFIGS` (not on sys.path): `from configs.embedded import embedded`."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> ModuleSpec | None:
        package, _, module = name.partition(".")
        if package == "configs":
            return PathFinder.find_spec(name, [str(CONFIGS if module else CONFIGS.parent)])
        return None
