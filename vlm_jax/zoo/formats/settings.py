"""Allow-lists of config files: a key is read, or is known to change nothing, or is refused."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from vlm_jax.errors import UserError

ANY = ()  # as the supported values of a key: all


def neutral(keys: str, **supported: Iterable[Any]) -> dict[str, tuple]:
    """Returns key -> supported values: all for `keys`, separated by spaces."""
    return dict.fromkeys(keys.split(), ANY) | {key: tuple(values) for key, values in supported.items()}


def check(settings: Mapping[str, Any], read: Collection[str], neutral: Mapping[str, tuple], where: str) -> None:
    """Raises a UserError for the first setting that is neither read nor known to change nothing.

    Args:
      settings: of a file; None is as absent.
      read: the keys that the caller reads.
      neutral: other key -> the values with which it changes nothing; `ANY` for all.
      where: name of the file or section.
    """
    for key, value in settings.items():
        if value is None or key in read:
            continue
        if key not in neutral:
            raise UserError(
                f"{where} has {key} {value!r:.60}, which is not known here and might change the model; "
                "remove it if it does not"
            )
        if neutral[key] != ANY and not any(
            value is one or (value == one and type(value) is type(one)) for one in neutral[key]
        ):
            only = " or ".join(map(repr, neutral[key]))
            raise UserError(f"{where}.{key} is {value!r:.60}; only {only} is supported")
