"""Finds arrays that every device of a compiled step holds whole, against their sharding."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence

from vlm_jax.plan.collectives import each
from vlm_jax.plan.hlo import Program, shapes

MOST = 0.5  # of the parameters, together on every device


def replicated(
    program: Program, mesh_shape: Mapping[str, int], params: Mapping[str, Sequence[int]], pictures: Sequence[int] | None
) -> list[str]:
    """Returns a line for each of these faults; an empty list is good.

    - one all-gather of more than half of the parameters; FSDP gathers single layers.
    - all-gathers of whole stacks of layers, outside the loop over layers, of more than half of the parameters together.
    - the pictures of the whole batch, or their patches, on one device.

    Args:
      program: the result of `hlo.parse`.
      mesh_shape: sizes of the mesh's axes.
      params: shape of each parameter by name; parameters below `blocks/` are stacks.
      pictures: shape of the global batch of pictures, [B, H, W, 3] or packed; None for no pictures.
    """
    return [*_gathered(program, mesh_shape, params), *_whole_batch(program, mesh_shape, pictures)]


def _gathered(program, mesh_shape, params) -> Iterator[str]:
    number = sum(map(math.prod, params.values()))
    stacks = {(shape[0], math.prod(shape)) for name, shape in params.items() if re.search(r"(^|/)blocks/", name)}
    together, where = 0, ""
    for one, parts, members in each(program, mesh_shape):
        if one.kind != "all-gather":
            continue
        whole = sum(map(math.prod, parts)) * members
        if whole > MOST * number:
            yield f"one all-gather has {whole / 1e6:,.1f}M of {number / 1e6:,.1f}M parameters: {one.where}"
        of_stacks = [part for part in parts if part and (part[0], math.prod(part) * members) in stacks]
        if of_stacks:
            together, where = together + sum(map(math.prod, of_stacks)) * members, one.where
    if together > MOST * number:
        yield (
            f"all-gathers of all layers at once have {together / 1e6:,.1f}M of {number / 1e6:,.1f}M parameters, such "
            f"as {where}"
        )


def _whole_batch(program, mesh_shape, pictures) -> Iterator[str]:
    if pictures is None or mesh_shape["data"] * mesh_shape["fsdp"] == 1:
        return
    for _, instruction, _ in program.steps():
        for shape in shapes(instruction.type):
            if pictures[0] in shape and math.prod(shape) == math.prod(pictures):
                yield f"a device has all {pictures[0]:,} pictures, {list(shape)}: {instruction.name}"
                return
