"""Where parameters stand in their towers, from their names: before, in or after the blocks."""

import re
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.params.table import named_leaves

BEFORE = r"(.*/)?(patch_embed|pos_embed|cls|registers|pre_norm|token_embed|token_type_embed|relative|stem(_\w+)?)(/.*)?"


class Place(NamedTuple):
    """The place of a parameter.

    Attributes:
      tower: prefix of the tower's names, e.g. "image/".
      depth: n, the number of the tower's blocks; 0 outside towers.
      layer: 0 before the blocks (embeddings, positions, stem), i + 1 in `blocks_<i>`, n + 1 after the blocks (norms,
        pools, heads, logit scale). Of a scanned stack `blocks`: 1, ..., n as an array [n, 1, ...] that broadcasts to
        the parameter.
    """

    tower: str
    depth: int
    layer: int | np.ndarray


def places(params: Any) -> dict[str, Place]:
    """Returns `{name: Place}` of parameters, arrays or shapes."""
    leaves = named_leaves(params)
    blocks = {name: re.fullmatch(r"((?:.*/)?)blocks(?:_(\d+))?/.*", name) for name in leaves}
    depths: dict[str, int] = {}
    for name, match in blocks.items():
        if match:
            depth = int(match[2]) + 1 if match[2] else leaves[name].shape[0]
            depths[match[1]] = max(depth, depths.get(match[1], 0))

    def place(name, match):
        if match is None:
            tower = max((tower for tower in depths if name.startswith(tower)), key=len, default="")
            depth = depths.get(tower, 0)
            return Place(tower, depth, 0 if re.fullmatch(BEFORE, name) else depth + 1)
        depth = depths[match[1]]
        stacked = np.arange(1, depth + 1).reshape(depth, *(1,) * (len(leaves[name].shape) - 1))
        return Place(match[1], depth, int(match[2]) + 1 if match[2] else stacked)

    return {name: place(name, match) for name, match in blocks.items()}


def block_totals(scores: Any) -> dict[tuple[str, int], float]:
    """Returns the sum of the scores of each block, {(tower, number from 1): total}, in order of towers and blocks."""
    totals: dict[tuple[str, int], float] = {}
    leaves = named_leaves(scores)
    for name, place in places(scores).items():
        leaf = np.asarray(leaves[name], np.float64)
        rows = leaf if np.ndim(place.layer) else leaf[None]
        for number, row in zip(np.ravel(place.layer), rows, strict=True):
            if 1 <= number <= place.depth:
                key = place.tower, int(number)
                totals[key] = totals.get(key, 0.0) + float(np.sum(row))
    return dict(sorted(totals.items()))
