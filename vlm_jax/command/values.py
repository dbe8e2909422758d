"""Parses the values of flags into Python values."""

import ast
from collections.abc import Sequence
from typing import Any

from absl import flags

from vlm_jax.errors import UserError


def given(values: flags.FlagValues, names: Sequence[str]) -> dict[str, Any]:
    """Returns the flags among `names` that have a value, as Python values."""
    found = {}
    for name in names:
        value = values[name].value
        if value is not None:
            read, expected = READ.get(name, (lambda value: value, ""))
            try:
                found[name] = read(value)
            except (ValueError, SyntaxError):
                spelled = ",".join(value) if isinstance(value, list) else value
                raise UserError(f"--{name}={spelled:.60} cannot be read; expected {expected}") from None
    return found


def data_uri(values: flags.FlagValues, name: str = "data") -> str:
    """Returns `--data` or another data set, with the option that `--allow_outside` asks for."""
    return f"{values[name].value}?allow_outside" if values.allow_outside else values[name].value


def _where(conditions: Sequence[str]) -> dict[str, list]:
    """["style=noto,twemoji", "group=3"] -> {"style": ["noto", "twemoji"], "group": [3]}."""
    where = {}
    for condition in conditions:
        name, values = condition.split("=", 1)
        where[name] = [int(value) if value.lstrip("-").isdecimal() else value for value in values.split(",")]
    return where


def _options(conditions: Sequence[str]) -> dict[str, Any]:
    """["shots=4", "kinds=['order']", "solver=lbfgs"] -> {"shots": 4, "kinds": ["order"], "solver": "lbfgs"}."""
    options = {}
    for name, value in (condition.split("=", 1) for condition in conditions):
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options


def _sides(sides: Sequence[str]) -> list[int]:
    """["384"] -> [384, 384]; ["384", "288"] -> [384, 288]."""
    height, width = sides * 2 if len(sides) == 1 else sides
    return [int(height), int(width)]


READ = {
    "where": (_where, "field=value,value such as style=noto"),
    "train_where": (_where, "field=value,value such as style=noto"),
    "train_split": (lambda text: text or None, "a split, or nothing where the data set has none"),
    "option": (_options, "name=value such as shots=4"),
    "classes": (
        lambda text: ast.literal_eval(text) if text.startswith(("[", "{")) else text,
        "a name, a file, a list ['cat', 'dog'] or labels and names {7: 'cat', 3: 'dog'}",
    ),
    "acquisition": (
        lambda text: ast.literal_eval(text) if text.startswith("{") else text,
        "a strategy, pcb, or with its options {'name': 'pcb', 'share': 0.2}",
    ),
    "ks": (lambda values: [int(value) for value in values], "whole numbers such as 1,5,10"),
    "image_size": (_sides, "pixels, 384 or height,width"),
    "mesh": (lambda parts: {axis: int(size) for axis, size in (part.split("=") for part in parts)}, "data=8,fsdp=1"),
}
