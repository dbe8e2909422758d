"""Lists of classes (label -> name) and of prompts: packaged, in files, or a data set's own.

`labels.Classes` says which class a picture's label means.
"""

import re

from vlm_jax.data.class_lists import options, packaged, read, read_templates
from vlm_jax.data.source import TRIED, BadExample, Source, check_field
from vlm_jax.data.sources.folder import SPLITS
from vlm_jax.errors import UserError
from vlm_jax.evaluators.records import read_fields

__all__ = ["find_label", "of_source", "packaged", "read", "read_templates"]
LABELS = ("label", "cls", "concept")  # of TFDS and folders, of webdatasets, of the embedded data set


def of_source(source: Source, label: str, about: str) -> dict[int | str, str]:
    """Returns label -> name from the data set itself: a folder's sub-folders, a TFDS ClassLabel, labels that are text.

    Underscores become spaces. Raises a UserError if there are no names, or only numbers or WordNet ids.
    """
    own = source.label_names(label) or {name: name for name in _texts(source, label)}
    names = list(own.values())
    if not names:
        _check_records(source, label, about)
    if not names or all(re.fullmatch(r"\d+|n\d{8}", name) for name in names):
        what = f"has for its `{label}` no names but `{names[0]}`, ..." if names else f"has no names for its `{label}`"
        raise UserError(f"{about} {what}; give --classes: {options('classes', '`emoji:seen`')}")
    if SPLITS.issuperset(name.lower() for name in names):
        raise UserError(f"{about} has the folders {', '.join(names)}, which are splits; give one of them as --split")
    return {key: name.replace("_", " ") for key, name in own.items()}


def find_label(source: Source, about: str) -> str:
    """Returns the first of LABELS that one of the source's first records has."""
    narrow, bad = source.narrow(frozenset(LABELS)), None
    for i in range(min(len(source), TRIED)):
        try:
            record = narrow[i]
        except (BadExample, OSError) as error:
            bad = error
            continue
        for label in LABELS:
            if label in record:
                return label
    try:
        fields = ", ".join(source[0])
    except (BadExample, OSError):
        fields = f"none in its first record, which cannot be read ({bad})"
    if fields == "image":
        raise UserError(
            f"{about} has pictures without labels; put them in one folder per name, or name them in a table"
        )
    raise UserError(f"{about} has no field {' or '.join(LABELS)}; give --label, one of: {fields}")


def _check_records(source: Source, label: str, about: str) -> None:
    """Raises a UserError if there are no records, the first cannot be read, or none has the label."""
    if not len(source):
        raise UserError(f"{about} has no records")
    try:
        source.narrow(frozenset([label]))[0]
    except BadExample as error:
        raise UserError(f"{about}: {source.key(0)} cannot be read: {error}") from None
    check_field(source, label, about)


def _texts(source: Source, label: str) -> list[str]:
    """The different texts, in order, that records have as labels; none if a record has another kind of label."""
    found = set()
    for record in read_fields(source, None, [label]):
        values = record[0] if record and isinstance(record[0], list) else record or ()
        if not all(isinstance(value, str) for value in values):
            return []
        found.update(value.strip() for value in values)
    return sorted(found - {""})
