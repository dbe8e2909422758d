"""Fields of a data set's records, read without pictures, and the texts in these fields."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_jax.data.source import Source, field


def read_fields(source: Source, chosen: np.ndarray | None, paths: Sequence[str]) -> list[list[Any] | None]:
    """The values at `paths` of the chosen records, on every host.

    `chosen` None: all records. None stands for a record that cannot be read or lacks a field.
    """
    source, rows = source.narrow(frozenset(paths)), []
    for i in range(len(source)) if chosen is None else chosen:
        try:
            record = source[int(i)]
            rows.append([field(record, path) for path in paths])
        except Exception:  # of any odd record
            rows.append(None)
    return rows


def texts(values: Sequence[Any]) -> list[str]:
    """The texts of some fields, each a text or a list of texts; empty texts and what is no text are left out."""
    found = [text for value in values for text in (value if isinstance(value, list | tuple) else [value])]
    return [text for text in found if isinstance(text, str) and text.strip()]
