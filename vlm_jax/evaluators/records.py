"""Fields of a data set's records, read without their pictures."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_jax.data.source import BadExample, Source, field


def read_fields(source: Source, chosen: np.ndarray | None, paths: Sequence[str]) -> list[list[Any] | None]:
    """The values at `paths` of the chosen records (None: of all), on every host; None for a record that lacks one."""
    source, rows = source.narrow(frozenset(paths)), []
    for i in range(len(source)) if chosen is None else chosen:
        try:
            record = source[int(i)]
            rows.append([field(record, path) for path in paths])
        except (BadExample, OSError):
            rows.append(None)
    return rows
