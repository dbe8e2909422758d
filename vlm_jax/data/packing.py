"""Packs several pairs of short inputs and targets into a row, for `EncoderDecoder(..., segments=...)`."""

from typing import NamedTuple

import numpy as np

from vlm_jax.data.spans import before, ends
from vlm_jax.errors import UserError


class Packed(NamedTuple):
    """Packed pairs: int32 [R, inputs_length] or [R, targets_length], padded with 0.

    Attributes:
      inputs, targets: token ids.
      input_segments, target_segments: 1, 2, ... for the pairs of a row: a token sees its own segment only.
      input_positions, target_positions: 0, 1, ... in each segment.
      order: int32 [N], the pairs' numbers, row by row from left to right.
    """

    inputs: np.ndarray
    input_segments: np.ndarray
    input_positions: np.ndarray
    targets: np.ndarray
    target_segments: np.ndarray
    target_positions: np.ndarray
    order: np.ndarray


def pack(
    inputs: np.ndarray,
    targets: np.ndarray,
    *,
    eos_id: int,
    inputs_length: int,
    targets_length: int,
    rows: int | None = None,
) -> Packed:
    """Packs pairs in order, each into the first row with room for inputs and targets.

    Args:
      inputs, targets: integers [N, ...], each with its EOS.
      eos_id: ends inputs and targets.
      inputs_length, targets_length: lengths of a row.
      rows: number of rows, R; None for as many as needed.

    Raises:
      UserError: a pair is longer than a row, or `rows` are too few.
    """
    sizes = np.stack([ends(inputs, eos_id), ends(targets, eos_id)], 1)
    room = np.tile([inputs_length, targets_length], (len(sizes), 1))
    whole = room[:1].copy()
    if (sizes > whole).any():
        raise UserError(
            f"a pair of {tuple(sizes[(sizes > whole).any(1)][0].tolist())} tokens is to be packed into rows of "
            f"{inputs_length} and {targets_length}; make the rows longer, or cut texts to `longest(...)` first"
        )
    row, segment, start = np.empty(len(sizes), int), np.empty(len(sizes), int), np.empty_like(sizes)
    held = np.zeros(len(sizes), int)
    for i, size in enumerate(sizes):
        r = row[i] = (room >= size).all(1).argmax()
        start[i] = whole - room[r]
        room[r] -= size
        held[r] += 1
        segment[i] = held[r]
    used = int((held > 0).sum())
    if rows is not None and used > rows:
        raise UserError(f"{len(sizes)} pairs fill {used} rows, and there are {rows}; raise rows or pack fewer pairs")

    def laid_out(ids: np.ndarray, size: np.ndarray, start: np.ndarray, width: int) -> list[np.ndarray]:
        out = np.zeros((3, used if rows is None else rows, width), np.int32)
        position = np.arange(size.sum()) - before(size).repeat(size)
        place = row.repeat(size), start.repeat(size) + position
        tokens = ids[np.arange(ids.shape[1]) < size[:, None]]
        for plane, values in zip(out, (tokens, segment.repeat(size), position), strict=True):
            plane[place] = values
        return list(out)

    return Packed(
        *laid_out(inputs, sizes[:, 0], start[:, 0], inputs_length),
        *laid_out(targets, sizes[:, 1], start[:, 1], targets_length),
        np.lexsort((segment, row)).astype(np.int32),
    )


def unpack(packed: Packed) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the packed pairs in their original order, without padding."""
    pairs = [
        (packed.inputs[r][packed.input_segments[r] == s], packed.targets[r][packed.target_segments[r] == s])
        for r in range(len(packed.inputs))
        for s in range(1, packed.input_segments[r].max() + 1)
    ]
    return [pairs[i] for i in np.argsort(packed.order)]
