"""The classes of a zero-shot task: labels and their names."""

import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from vlm_jax.errors import UserError


def read(classes: str | Sequence[str] | Mapping[int, str]) -> dict[int | str, str]:
    """Returns label -> name.

    Args:
      classes: "emoji:seen" or "emoji:held_out" (the embedded data set's concepts of groups 3-7), a .txt file (line i
        names label i), a .json file (a list likewise, or an object from labels to names), a list or a mapping.
    """
    if isinstance(classes, str) and classes.startswith("emoji:"):
        return _emoji(classes)
    names = _file(classes) if isinstance(classes, str) else classes
    if isinstance(names, Mapping):
        named = {int(label) if str(label).isdecimal() else label: name for label, name in names.items()}
    else:
        named = dict(enumerate(names))
    if not named or not all(isinstance(name, str) and name.strip() for name in named.values()):
        raise UserError(f"classes {classes!r:.60} are not a list of names or a mapping from labels to names")
    return named


def _emoji(classes: str) -> dict[int, str]:
    from vlm_jax.data import emoji

    part = classes.removeprefix("emoji:")
    if part not in ("seen", "held_out"):
        raise UserError(f"classes are `{classes}`; expected `emoji:seen` or `emoji:held_out`")
    return emoji.concepts(held_out=part == "held_out")


def _file(path: str) -> Sequence[str] | Mapping[str, str]:
    if not pathlib.Path(path).is_file():
        raise UserError(f"there is no file of class names {path}; expected a .txt or .json file, or `emoji:seen`")
    text = pathlib.Path(path).read_text(encoding="utf-8")
    if path.endswith(".txt"):
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise UserError(f"{path} is neither a .txt file of names nor JSON: {e}") from e


def index_of(named: Mapping[int | str, str]) -> Callable[[Iterable], np.ndarray]:
    """Returns a function from labels (lists of one number or name, as `ops.boxed` makes them) to class indices int [B].

    -1 stands for a label that is no class's.
    """
    index = {name: i for i, name in enumerate(named.values())} | {label: i for i, label in enumerate(named)}
    return lambda labels: np.array([index.get(label, -1) for (label,) in labels], np.int64)
