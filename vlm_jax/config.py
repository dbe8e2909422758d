"""Config sections: each is the keyword arguments of one function. Unknown and missing keys raise."""

import functools
import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from vlm_jax.errors import UserError, near


def call(fn: Callable, section: Mapping[str, Any], where: str, **fixed) -> Any:
    """Returns `fn(**section, **fixed)`.

    Args:
      fn: a function or class whose parameters are named explicitly (`**kwargs` accepts every key).
      section: a config section (dict or ConfigDict).
      where: name of the section in messages, e.g. "config.model.image".
      **fixed: arguments from the caller; the config may not set them.

    Raises:
      UserError: the section has a key that `fn` does not take, or lacks a key that `fn` needs.
    """
    parameters = inspect.signature(fn).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = [name for name in parameters if name not in fixed and name not in ("self", "parent")]
    for key in section:
        if key not in known and not open_ended:
            hint = near(key, known, f"known keys: {', '.join(known)}")
            raise UserError(f"{where} has no key `{key}`; {hint}")
    for name in known:
        required = parameters[name].default is inspect.Parameter.empty
        named = parameters[name].kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        if required and named and name not in section:
            raise UserError(f"{where} lacks the key `{name}`, which has no default")
    for key, value in section.items():
        check_number(parameters.get(key), value, where)
    return fn(**section, **fixed)


def checked(function: Callable) -> Callable:
    """Decorates a public function: arguments that it does not take, or lacks, raise a UserError, not a TypeError."""
    signature = inspect.signature(function)
    known = [name for name in signature.parameters if name != "self"]

    @functools.wraps(function)
    def with_known(*args, **kwargs):
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            hints = (near(name, known) for name in kwargs if name not in known)
            hint = next(filter(None, hints), f"its arguments: {', '.join(known)}")
            raise UserError(f"`{function.__name__}`: {error}; {hint}".replace("'", "`")) from None
        return function(*args, **kwargs)

    return with_known


def check_number(parameter: inspect.Parameter | None, value: Any, where: str) -> None:
    """Raises a UserError if a parameter declared as a number gets a text, a list, a dict or None."""
    kind = parameter.annotation if parameter else Any
    kinds = set(typing.get_args(kind)) if isinstance(kind, types.UnionType) else {kind}
    if not kinds <= {int, float, type(None)}:
        return
    cut = isinstance(value, float) and float not in kinds and not value.is_integer()
    if cut or isinstance(value, str | list | tuple | Mapping) or (value is None and type(None) not in kinds):
        expected = "a number" if float in kinds else "a whole number"
        raise UserError(f"{where}: {parameter.name}={value!r:.60} should be {expected}")


def check_least(least: float, where: str, **values: Any) -> None:
    """Raises a UserError that names the first number below `least`; anything else passes."""
    for name, value in values.items():
        if isinstance(value, int | float) and not value >= least:
            raise UserError(f"{where}.{name} is {value!r}; expected {least} or more")


def choose(options: Mapping[str, Any], name: str, where: str) -> Any:
    """Returns `options[name]`; raises a UserError that lists the options if `name` is unknown."""
    if name not in options:
        hint = near(name, options)
        raise UserError(f"{where} is `{name}`; expected one of: {', '.join(map(str, options))}{hint and f'; {hint}'}")
    return options[name]


def plain(section: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config after a round trip through JSON: dicts, lists, strings, numbers."""
    return json.loads(json.dumps(section, default=lambda value: value.to_dict()))


def flatten(section: Any, prefix: str = "") -> dict[str, Any]:
    """Returns nested dicts as one flat dict: {"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(section, Mapping):
        return {prefix: section}
    flat = {}
    for key, value in section.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat
