"""Prompts that are computed from something else, put where the towers have theirs."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.errors import UserError


def widths(model: Any) -> tuple[int, int]:
    """Width of the text tower and of the image tower, which both have to be transformers."""
    for tower in ("text", "image"):
        if not hasattr(getattr(model, tower, None), "depth"):
            raise UserError(f"maple and upt put prompts into two transformers; this model's {tower} tower is none")
    return model.text.width, model.image.width


def spread(tower: str, rows: jax.Array, leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Rows [J, n, D], one of each of the first J blocks, as the inserted parameters of a tower; 0 for later blocks."""
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
