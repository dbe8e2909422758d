"""The registry of ops, and what ops share: fields of nested records, the exception for an unusable record."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

OPS: dict[str, Callable] = {}
SUBJECTS = ("image", "text", "example")


class BadExample(Exception):  # noqa: N818 (it is a property of the data, counted and skipped, not of the program)
    """This record cannot be used: the reason, as a short phrase. Raised by ops, handled by the loader."""


def op(function: Callable) -> Callable:
    """Registers `function` as an op under its name. Its parameters say what it works on:

    * the first is `image` or `text`: that field of the example is replaced by what the op returns;
      or `example`: the op takes and returns the whole dict;
    * the second may be `rng`: the op is random and is given the example's own `np.random.Generator`;
    * `tokenizer` (keyword) is the tokenizer passed to `parse`;
    * all others are the arguments of the op string, checked against their annotations when the string is parsed.

    Of the record an op may read `image`, `text` and the fields whose paths are among its string arguments: others may
    not have been decoded. Between ops an image is a `PIL.Image` or a uint8 array [H, W, C], never changed in place.
    """
    names = list(inspect.signature(function).parameters)
    if names[0] not in SUBJECTS or "rng" in names[2:]:
        raise TypeError(f"op `{function.__name__}({', '.join(names)})`: expected (image|text|example[, rng], ...)")
    OPS[function.__name__] = function
    return function


def field(example: Mapping[str, Any], path: str) -> Any:
    """Returns the value at a `/`-joined path of a nested record; raises BadExample where there is none."""
    value = example
    for name in path.split("/"):
        if not isinstance(value, Mapping) or name not in value:
            known = ", ".join(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
            raise BadExample(f"has no field `{path}` (there: {known})")
        value = value[name]
    return value
