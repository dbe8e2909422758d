"""The fields that the rows of a batch share, and rows stacked into a batch."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.data.source import BadExample
from vlm_jax.errors import UserError

Batch = dict[str, np.ndarray]
# Field -> its type: (shape, dtype) of an array, a numpy type or bool of a number, `object` of a text or a list, the
# fields of a dict of arrays.
Fields = dict[str, Any]

INT32 = np.iinfo(np.int32)
FLOAT32 = float(np.finfo(np.float32).max)
# A field has the type that this share of the rows has; rows of another type are bad examples.
SHARED = 2 / 3


def type_of(value: Any, texts: bool = False) -> Hashable | None:
    """Returns the type of a field's value, None for a value that no batch holds: see `Fields`."""
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype if value.dtype.kind not in "US" else np.dtype(value.dtype.kind)
    if isinstance(value, bool | np.bool_):  # before int: a bool is an int
        return bool
    if isinstance(value, int | np.integer):
        return np.int32
    if isinstance(value, float | np.floating):
        return np.float32
    if isinstance(value, dict) and value and all(isinstance(v, np.ndarray) for v in value.values()):
        return dict
    return object if texts and isinstance(value, str | list | tuple) else None


def fields_of(rows: Sequence[Mapping[str, Any]], texts: bool = False) -> Fields:
    """Returns the fields of most rows; `texts`: with fields of texts and lists.

    Raises:
      UserError: the rows disagree about a field: less than `SHARED` of the rows have one type.
    """
    fields = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        types = [type_of(row.get(name), texts) for row in rows]
        if set(types) == {np.int32, np.float32}:
            types = [np.float32] * len(types)
        most = max(types, key=types.count)
        if types.count(most) < SHARED * len(types):
            shapes = sorted({t[0] for t in types if isinstance(t, tuple)})
            if len(shapes) > 1:
                raise UserError(f"`{name}` has shapes {shapes[:3]}; the ops must give one shape (resize, pad)")
            if None in types:
                raise UserError(f"some examples lack the field `{name}`; choose fields with `keep(...)`")
            kinds = " and ".join(dict.fromkeys(map(_named, types)))
            raise UserError(f"`{name}` is {kinds}; the ops must give one type, or choose fields with `keep(...)`")
        if most is dict:
            fields[name] = fields_of([row[name] for row, own in zip(rows, types, strict=True) if own is dict])
        elif most is not None:
            fields[name] = most
    return fields


def check(row: Mapping[str, Any], fields: Fields) -> None:
    """Raises BadExample if a field of the row is absent, has another type, or is a number that does not fit."""
    for name, expected in fields.items():
        value = row.get(name)
        if isinstance(expected, dict) and type_of(value) is dict:
            check(value, expected)
        elif not _fits(value, expected):
            named = NAMES[dict] if isinstance(expected, dict) else _named(expected)
            raise BadExample(f"`{name}` is {_shown(value)}, in other examples {named}: choose fields with `keep(...)`")


def _fits(value: Any, expected: Any) -> bool:
    if isinstance(expected, tuple):
        wide = expected[1].itemsize == 8 and expected[1].kind in "iu"
        return type_of(value) == expected and not (wide and value.size and not _is_32_bits(value.min(), value.max()))
    if expected is object:
        return isinstance(value, str | list | tuple)
    if not isinstance(value, int | float | np.number | np.bool_):
        return False
    if expected is np.int32:
        return value == value // 1 and _is_32_bits(value, value)
    return bool(abs(value) <= FLOAT32) if expected is np.float32 else value in (0, 1)


def _is_32_bits(least: Any, most: Any) -> bool:
    return INT32.min <= least and most <= INT32.max


def _shown(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}" + (
            f" up to {value.max()}" if value.dtype.kind in "iu" and value.size else ""
        )
    return "absent" if value is None else f"{value}" if isinstance(value, int | float) else f"a {type(value).__name__}"


NAMES = {
    object: "a text or a list", dict: "a dict of arrays", np.int32: "an integer of 32 bits",
    np.float32: "a finite number", bool: "a bool", None: "absent",
}  # fmt: skip


def _named(expected: Hashable) -> str:
    return f"{expected[1]}{list(expected[0])}" if isinstance(expected, tuple) else NAMES[expected]


def collate(rows: Sequence[Mapping[str, Any]], texts: bool = False) -> Batch:
    """Stacks rows by the fields that they share; arguments as of `fields_of`."""
    return stack(rows, fields_of(rows, texts))


def stack(rows: Sequence[Mapping[str, Any]], fields: Fields) -> Batch:
    """Stacks rows that `check` accepts: arrays to [B, ...], numbers to int32, float32 or bool [B], texts to object [B].

    A dict of arrays is stacked too. Other fields are left out.
    """
    batch = {}
    for name, expected in fields.items():
        values = [row[name] for row in rows]
        if expected is object:
            batch[name] = np.empty(len(values), object)
            batch[name][:] = values
        elif isinstance(expected, dict):
            batch[name] = stack(values, expected)
        else:
            batch[name] = np.stack(values) if isinstance(expected, tuple) else np.asarray(values, expected)
    return batch
