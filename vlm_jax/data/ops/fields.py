"""Ops on the fields of an example: keep, rename."""

from vlm_jax.data.ops.registry import op
from vlm_jax.data.source import field


@op
def keep(example: dict, path: str, *paths: str) -> dict:
    """Keeps only the fields at `path` and `paths`, renamed to the last part of their paths (`name/en`: `en`)."""
    return {one.rsplit("/", 1)[-1]: field(example, one) for one in (path, *paths)}


@op
def rename(example: dict, old: str, new: str) -> dict:
    """Renames the field at path `old` to `new`."""
    example[new] = field(example, old)
    if "/" not in old and old != new:
        del example[old]
    return example
