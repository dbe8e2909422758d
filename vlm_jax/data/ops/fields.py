"""Ops on the fields of an example: keep, rename."""

from vlm_jax.data.ops.registry import op
from vlm_jax.data.source import field


@op
def keep(example: dict, *fields: str) -> dict:
    """Leaves only the named fields (the last part of a path such as `name/en` becomes the name)."""
    return {path.rsplit("/", 1)[-1]: field(example, path) for path in fields}


@op
def rename(example: dict, old: str, new: str) -> dict:
    """Calls the field at path `old` `new`."""
    example[new] = field(example, old)
    if "/" not in old and old != new:
        del example[old]
    return example
