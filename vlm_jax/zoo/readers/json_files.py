"""Reads the small JSON files that stand beside released weights."""

import json
from pathlib import Path
from typing import Any

from vlm_jax.errors import UserError


def read_json(path: Path, kind: type = dict) -> Any:
    """Returns the dict (or list) in a JSON file; an empty one if there is no file.

    Raises:
      UserError: the file is not JSON, or holds another type.
    """
    if not path.is_file():
        return kind()
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, kind):
        should = "object" if kind is dict else "array"
        raise UserError(
            f"{path} holds a {type(value).__name__}; expected a {kind.__name__}: it should hold a JSON {should}"
        )
    return value
