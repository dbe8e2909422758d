"""Places computed prompts where the towers have their inserted prompts."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.errors import UserError
from vlm_jax.models.transformer import Encoder


def widths(model: Any) -> tuple[int, int]:
    """Returns the widths of the text tower and the image tower; raises a UserError unless both are transformers."""
    for tower in ("text", "image"):
        if not isinstance(getattr(model, tower, None), Encoder):
            raise UserError(f"maple and upt put prompts into two transformers; this model's {tower} tower is none")
    return model.text.width, model.image.width


def spread(tower: str, rows: jax.Array, leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Rows [J, n, D] as the inserted parameters of a tower: row j for block j, 0 for blocks from J on."""
    spread = {}
    for name, leaf in leaves.items():
        if not re.fullmatch(rf"{tower}/(.*/)?inserted_(context|prompt)", name):
            continue
        block = re.search(r"/blocks(?:_(\d+))?/", name)
        if block is None:
            spread[name] = rows[0]
        elif block[1] is None:
            spread[name] = jnp.zeros_like(leaf).at[: len(rows)].set(rows)
        else:
            spread[name] = rows[int(block[1])] if int(block[1]) < len(rows) else jnp.zeros_like(leaf)
    return spread
