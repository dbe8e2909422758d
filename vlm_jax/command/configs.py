"""The experiments that come with vlm_jax, by name: `clip:smoke` is `get_config("smoke")` of configs/clip.py."""

import ast
import difflib
import re
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from vlm_jax.catalogue import CONFIGS
from vlm_jax.errors import UserError, near

KINDS = {bool: "True or False", int: "a whole number", float: "a number"}


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
        listed = f"known: {', '.join(known)}; a file of your own is given by its path, such as {name}.py"
        raise UserError(f"there is no config `{name}`; {near(name, known, listed)}")
    return f"{CONFIGS / name}.py{colon}{variant}"


def define(name: str, default: str | None, help_text: str, flag_values: flags.FlagValues) -> None:
    """Defines the flag of a config, a file or a name; `parse` also reads its overrides."""
    config_flags.DEFINE_config_file(name, default, help_text, flag_values=flag_values, sys_argv=[""])
    flag_values[name].parser = _Parser(name)


def parse(values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """Parses flags, then sets the values of the config that `--config.KEY=VALUE` gives; returns the other arguments."""
    given = [re.match(r"--?config\.([^=]+)(=?)(.*)", argument, re.S) for argument in argv]
    overrides = [match for match in given if match] if "config" in values else []
    left = values([argument for argument in argv if argument not in {match[0] for match in overrides}])
    if "config" in values and values.config is not None:
        getattr(values.config, "lock", None)  # any use raises the deferred error of a missing file
        for match in overrides:
            if not match[2]:
                raise UserError(f"{match[0]} has no value; write {match[0]}=VALUE")
            override(values.config, match[1], match[3])
    return left


def override(config: ConfigDict, path: str, text: str) -> None:
    """Sets `config.a.b` to the value that `text` spells; a section or a key that the config lacks is added.

    A str stays a str. Numbers, bools, None, lists, tuples and dicts are literals, of the type of the value before; the
    function that takes the section checks new keys.

    Raises:
      UserError: the value has another type, or a new key is nearly one that the config has.
    """
    keys, at = path.split("."), config
    for i, key in enumerate(keys):
        if not isinstance(at, ConfigDict):
            raise UserError(f"--config.{path}: `{'.'.join(keys[:i])}` is {at!r:.40} and has no keys")
        if key not in at and (close := difflib.get_close_matches(key, at.keys(), n=1, cutoff=0.8)):
            raise UserError(f"the config has no key `{path}`; did you mean `{'.'.join([*keys[:i], close[0]])}`?")
        section, at = at, at.get(key, ConfigDict())
        if key not in section and i < len(keys) - 1:
            with section.unlocked():
                section[key] = at
    value = _value(text, section.get(key), f"--config.{path}={text:.60}")
    with section.ignore_type(), section.unlocked():
        section[key] = value


def _value(text: str, before: Any, name: str) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = {"true": True, "false": False}.get(text.lower(), text)
    if isinstance(before, str) and isinstance(value, bool | int | float):
        return text
    whole = isinstance(value, float) and value.is_integer()
    if (type(before), type(value)) == (float, int) or (type(before) is int and whole):
        value = type(before)(value)
    duration = value == text and text[:1].isdigit()  # "3 epochs"
    other = duration or value is None or isinstance(value, dict | list | tuple)
    if type(before) in KINDS and type(value) is not type(before) and not other:
        raise UserError(f"{name} should be {KINDS[type(before)]}; the config has {before}")
    return value


class _Parser(config_flags.config_flags.ConfigFileFlagParser):
    def parse(self, path: str):
        located = locate(path)
        # a config given by name imports its neighbours from its own folder, even if the working directory has `configs`
        others = [finder for finder in sys.meta_path if finder is not _Neighbours]
        sys.meta_path[:] = [_Neighbours, *others] if located != path else [*others, _Neighbours]
        return super().parse(located)


class _Neighbours:
    """Finds `configs` and its modules in `CONFIGS` (not on sys.path): `from configs.embedded import embedded`."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> ModuleSpec | None:
        package, _, module = name.partition(".")
        if package == "configs":
            return PathFinder.find_spec(name, [str(CONFIGS if module else CONFIGS.parent)])
        return None
