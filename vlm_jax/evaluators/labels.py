"""Labels become classes by name; a number counts only where its own list of names travels with it."""

import functools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.data.class_lists import packaged
from vlm_jax.data.source import is_number
from vlm_jax.errors import UserError

SHOWN = 5  # names in a message

Look = Callable[[Any], int | None]


def plain(name: str) -> str:
    """Returns a name as names are compared: Unicode NFKC, no case, a space for underscores and hyphens inside."""
    text = unicodedata.normalize("NFKC", name).casefold()
    return re.sub(r"(?<=[^\W_])[\s_-]+(?=[^\W_])", " ", text).strip(" _\t\r\n") or name


class Classes:
    """The classes of a task, and the class that a label means.

    A label that is text is a name, as `plain` compares names; where no name of the list is a number, text such as "3"
    is also a number of the list. A label that is a number is found by its name in the data set's own list (the folders,
    a TFDS ClassLabel); without such a list it is a number of the list of classes. ImageNet's WordNet ids are numbers of
    a list of 1,000 classes. Labels with equal names are one class: ImageNet's list has `missile` twice.

    Args:
      named: label -> name, see `classes.read`.

    Attributes:
      named: as given.
      names: the names, all different, in the order of the list.
      of_label: label -> index of its name among `names`.
      repeated: the names of several labels.
    """

    def __init__(self, named: Mapping[int | str, str]):
        self.named, self.names = dict(named), []
        by_name: dict[str, int] = {}
        self.of_label: dict[int | str, int] = {}
        for label, name in self.named.items():
            self.of_label[label] = by_name.setdefault(plain(name), len(self.names))
            if self.of_label[label] == len(self.names):
                self.names.append(name)
        times = Counter(self.of_label.values())
        self.repeated = [name for i, name in enumerate(self.names) if times[i] > 1]
        keys = {label: i for label, i in self.of_label.items() if isinstance(label, str)}
        self._of_text = by_name | {plain(label): i for label, i in keys.items()} | keys
        self._numbers_are_labels = not any(map(is_number, self._of_text))
        self._found = functools.cache(self._find)
        self._is_imagenet = self.named.keys() == set(range(len(_wordnet_ids())))

    def __len__(self) -> int:
        return len(self.names)

    def look(self, own: Mapping[int, str] | None, about: str) -> Look:
        """Returns the function from a label to the index of its class, or None if it is in no class, as several labels.

        Args:
          own: the data set's own list, see `Source.label_names`.
          about: the data set, for errors.

        Raises:
          UserError: some names of both lists match nothing in the other list.
        """
        table = None if own is None else {label: self._of_own(label, name) for label, name in own.items()}
        if table is not None:
            self._check(own, table, about)

        def look(value: Any) -> int | None:
            if isinstance(value, list | tuple | np.ndarray):
                value = value[0] if len(value) == 1 else None
            if isinstance(value, str | bytes):
                return self._found(value)
            if not isinstance(value, int | float | np.number):
                return None
            return (self.of_label if table is None else table).get(value)

        return look

    def without_picture(self, labels: np.ndarray) -> list[str]:
        """Returns the names of the classes that are not among labels, int [N]."""
        count = np.bincount(labels[labels >= 0], minlength=len(self))
        return [name for name, n in zip(self.names, count, strict=True) if not n]

    def notes(self, labels: np.ndarray, left_out: Callable[[], Counter] = Counter) -> list[str]:
        """Returns what a result says about its classes.

        Args:
          labels: int [N], the classes of the pictures.
          left_out: returns the labels of pictures that are in no class; called if a class has no picture.
        """
        notes, lacking = [], self.without_picture(labels)
        if self.repeated:
            notes.append(f"several labels have one name and are one class: {some(self.repeated)}")
        if lacking:
            notes.append(f"{len(lacking)} of {len(self)} classes have no picture: {some(lacking)}")
            if strange := left_out():
                of_each = [f"{name} ({count})" for name, count in strange.most_common()]
                notes.append(f"pictures with other labels are left out: {some(of_each)}")
        return notes

    def _find(self, text: str | bytes) -> int | None:
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        for name in (text, plain(text)):
            if name in self._of_text:
                return self._of_text[name]
        name = text.strip()
        if self._numbers_are_labels and is_number(name):
            return self.of_label.get(int(name))
        return self.of_label.get(_wordnet_ids().get(name)) if self._is_imagenet else None

    def _of_own(self, label: int, name: str) -> int | None:
        same = plain(self.named.get(label, "")) == plain(name)  # of several classes with such a name, the one meant
        return self.of_label[label] if same else self._found(name)

    def _check(self, own: Mapping[int, str], table: Mapping[int, int | None], about: str) -> None:
        lost = [name for label, name in own.items() if table[label] is None]
        used = set(table.values())
        unused = [name for i, name in enumerate(self.names) if i not in used]
        if lost and unused:
            example = json.dumps({lost[0]: unused[0]}, ensure_ascii=False)
            raise UserError(
                f"{about} and the classes disagree: {some(lost)} of its {len(own)} names are no classes, and "
                f"{some(unused)} of the {len(self)} classes are none of its names; use its names, or a .json file "
                f"from its names to yours as --classes, such as {example}"
            )


def some(names: Sequence[str]) -> str:
    """Returns the first names as text, and the number of the others."""
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(f"{name:.60}" for name in names[:SHOWN]) + more


def strangers(records: Iterable[Sequence | None], look: Look) -> Counter:
    """Returns label -> count of the records' labels that are in no class."""
    values = (record[0] for record in records if record)
    return Counter(str(value) for value in values if look(value) is None)


def indices(records: Iterable[Sequence | None], look: Look) -> np.ndarray:
    """Returns the classes of records, int [N]; -1 for an unknown label and for a record without a label."""
    found = (None if record is None else look(record[0]) for record in records)
    return np.array([-1 if i is None else i for i in found], np.int64)


def fewer(names: Sequence[str], labels: np.ndarray, shots: int | None, kept: int = 0) -> list[str]:
    """Returns what a result says about classes with fewer training pictures than `shots`.

    Args:
      names: of the classes.
      labels: int [N], classes of the training pictures; -1 for none.
      shots: pictures asked for, of each class; None for all.
      kept: pictures of a class that are kept apart, if it has more than these.
    """
    count = np.bincount(labels[labels >= 0], minlength=len(names))
    count = np.maximum(count - kept, np.minimum(count, 1))
    few = [f"{names[i]} ({count[i]})" for i in np.argsort(count, kind="stable") if count[i] < (shots or 1)]
    if not few:
        return []
    wanted = "any training picture" if shots is None else f"{shots} training pictures"
    return [f"{len(few)} of {len(names)} classes do not have {wanted}: {some(few)}"]


@functools.cache
def _wordnet_ids() -> dict[str, int]:
    """ImageNet's WordNet ids -> its numbers."""
    return {name: i for i, name in enumerate(packaged("wordnet_ids")["imagenet"])}
