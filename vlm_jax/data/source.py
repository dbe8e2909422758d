"""A source: records by index, fields by path, and the error for an unusable record."""

import contextlib
from collections.abc import Callable, Hashable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Self

import numpy as np

from vlm_jax import catalogue
from vlm_jax.errors import StoreError, UserError


class BadExample(Exception):  # noqa: N818 (it is a property of the data, counted and skipped, not of the program)
    """A record cannot be used, for a reason given as a short phrase.

    Sources and ops raise this error; the loader handles it.

    Args:
      reason: the phrase.
      kind: what is wrong, for counts: "file", "row", "field", "picture", "text", or the type of another exception.
    """

    def __init__(self, reason: str, kind: str = "field"):
        super().__init__(reason, kind)
        self.reason, self.kind = reason, kind

    def __str__(self) -> str:
        return self.reason


def is_number(text: str) -> bool:
    """Returns whether a text is a whole number that a label can be: ASCII digits, below 2^31."""
    return text.isascii() and text.isdecimal() and len(text) < 20 and int(text) < 2**31


class Source:
    """Records by index; picklable, for worker processes.

    Attributes:
      left_out: entries of the data set's files that are no record: what they are -> their number.
      remote: records come from a store: reading them in order is faster than at random.
    """

    left_out: Mapping[str, int] = MappingProxyType({})
    remote = False

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Returns the raw record: encoded bytes under "image", text and numbers under their own names."""
        raise NotImplementedError

    def key(self, i: int) -> str:
        """Returns the name of the record for people: a file, a line, a member of a shard."""
        raise NotImplementedError

    def label_names(self, path: str) -> dict[int, str] | None:
        """Returns label -> name of the whole numbers at `path`, if the data set itself names them, else None."""
        return None

    def fingerprint(self) -> str:
        """Returns a short hash that changes with the records; cheap, so it may miss a change inside of a record."""
        return str(len(self))

    def soon(self, numbers: Iterable[int], next_: bool = False) -> None:
        """Prepares for these records to be read, before all others if they are the `next_` ones; raises nothing."""

    def warn_of_window(self, count: int) -> None:
        """Logs a warning if a source in a store cannot hold two times `count` examples, which are mixed at a time."""

    def narrow(self, paths: frozenset[str]) -> Self:
        """Returns the same records; may leave out fields that are not in `paths`, if that is cheaper."""
        return self


def field(record: Mapping[str, Any], path: str) -> Any:
    """Returns the value at a `/`-joined path of a nested record; raises BadExample if the record has none."""
    value = record
    for name in path.split("/"):
        if not isinstance(value, Mapping) or name not in value:
            known = ", ".join(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
            raise BadExample(f"has no field `{path}` (there: {known})")
        value = value[name]
    return value


TRIED = 100  # records in which a field is looked for
AHEAD = 256  # records that a source is told of before a pass in order reads them


def check_field(source: Source, path: str, about: str, whole: Callable[[], Source] | None = None) -> None:
    """Raises a UserError that lists the fields if none of the source's first records has the field `path`.

    A record that cannot be read may have any field. `whole` opens the records with all their fields, for the message.
    """
    narrow = source.narrow(frozenset([path]))
    for i in range(min(len(source), TRIED)):
        try:
            if path.split("/")[0] not in narrow[i]:
                continue
        except StoreError:
            raise
        except Exception:  # of any odd record
            pass
        return
    known = ()
    with contextlib.suppress(Exception):
        known = tuple(map(str, (whole() if whole else source)[0]))
    if known:
        raise UserError(catalogue.unknown(f"{about} has no field `{path}`", path, dict.fromkeys(known)))


def select(source: Source, where: Mapping[str, Iterable[Any]], unusable: list[str] | None = None) -> np.ndarray:
    """Returns the indices of the records whose fields all have values in `where`.

    `where` maps field paths, such as "name/en", to accepted values; a number is also accepted as text, because a csv
    holds nothing else. A record that lacks the field, or that cannot be read, is not selected; its key is appended to
    `unusable`. Reads each record once.
    """
    wanted = {path: {values} if isinstance(values, str) else set(values) for path, values in where.items()}
    wanted = {path: values | {str(v) for v in values if isinstance(v, int | float)} for path, values in wanted.items()}
    source = source.narrow(frozenset(wanted))
    chosen = []
    for i in range(len(source)):
        if i % AHEAD == 0:
            source.soon(range(i + AHEAD, min(i + 2 * AHEAD, len(source))))
        try:
            record = source[i]
            if all(_is_in(field(record, path), values) for path, values in wanted.items()):
                chosen.append(i)
        except StoreError:
            raise
        except Exception:  # of any odd record
            if unusable is not None:
                unusable.append(source.key(i))
    return np.asarray(chosen, np.int64)


def _is_in(value: Any, values: set) -> bool:
    return isinstance(value, Hashable) and value in values
