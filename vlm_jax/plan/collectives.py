"""What the chips of a compiled program say to each other: every collective, over which mesh axes, how many bytes."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from vlm_jax.plan.hlo import COLLECTIVES, Computation, Instruction, Program, size

WORK = ("fusion", "custom-call", "convolution", "dot", "while", "call")


class Collective(NamedTuple):
    """The collectives of a step that are alike.

    Attributes:
      kind: the operation of HLO.
      axes: mesh axes along which the members of a group differ.
      asynchronous: whether other work runs between its start and its end.
      count: how often a step runs it; those that XLA has combined are one.
      bytes: what a device sends in a step, by a ring: of an all-reduce of n bytes in groups of g, 2 n (g - 1) / g, of a
        reduce-scatter or all-to-all half of it; (g - 1) times its part in an all-gather; what it has in a permute.
      largest: bytes of the largest array, or of arrays combined, that one of them gathers or reduces.
      where: of that one, the name of the operation in the traced step.
    """

    kind: str
    axes: tuple[str, ...]
    asynchronous: bool
    count: int
    bytes: int
    largest: int
    where: str


def collectives(program: Program, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """All collectives of a program that runs on a mesh, those with the most bytes first.

    Args:
      program: of `hlo.parse`.
      mesh_shape: sizes of the mesh's axes; device i of the program is device i of the flattened mesh.
    """
    found: dict[tuple, Collective] = {}
    for caller, instruction, times in program.steps():
        for computation, inner, asynchronous in _inside(program, caller, instruction):
            groups = groups_of(inner.attributes, mesh_shape)
            axes, members = axes_of(groups, mesh_shape), groups.shape[-1]
            if not axes:
                continue  # each device by itself
            kind = inner.kind
            if kind == "all-reduce" and instruction.called().startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # how a TPU's program says it: each device keeps a slice
            has = sum(size(computation.instructions[name].type) for name in inner.operands)
            sent, largest = _bytes(kind, has, members)
            where = re.search(r'op_name="([^"]*)"', inner.attributes + instruction.attributes)
            new = Collective(kind, axes, asynchronous, times, times * sent, largest, where[1] if where else "")
            key = kind, axes, asynchronous
            found[key] = _together(found[key], new) if key in found else new
    return sorted(found.values(), key=lambda one: -one.bytes)


def _inside(program: Program, caller: Computation, instruction: Instruction):
    """(computation, collective, whether asynchronous) of an instruction: itself, or those in what it calls.

    A TPU runs some beside fusions: a fusion with `AsyncCollectiveStart` begins one, those with another name or
    marker that hold the same collective again carry it on and end it.
    """
    if instruction.kind in COLLECTIVES:
        yield caller, instruction, _overlaps(caller, instruction)
    elif instruction.opcode in ("fusion", "async-start"):
        inner = program.computations[instruction.called()]
        marks = {target[1] for i in inner.instructions.values() if (target := _target(i))}
        goes_on = instruction.called().startswith("async_collective_fusion") or "AsyncCollectiveDone" in marks
        if "AsyncCollectiveStart" not in marks and goes_on:
            return
        asynchronous = instruction.opcode == "async-start" or "AsyncCollectiveStart" in marks
        for one in inner.instructions.values():
            if one.kind in COLLECTIVES:
                yield inner, one, asynchronous


def _overlaps(computation: Computation, start: Instruction) -> bool:
    """Whether work is scheduled between the start of a collective and its end; the text of a program is in order."""
    if not start.opcode.endswith("-start") or '"is_sync":true' in start.attributes:
        return False
    order = list(computation.instructions.values())
    begun = order.index(start)
    end = next((i for i, one in enumerate(order) if one.opcode.endswith("-done") and start.name in one.operands), begun)
    return any(one.opcode in WORK for one in order[begun:end])


def _target(instruction: Instruction):
    return re.search(r'custom_call_target="(AsyncCollective\w+)"', instruction.attributes)


def groups_of(attributes: str, mesh_shape: Mapping[str, int]) -> np.ndarray:
    """Devices that a collective joins, [groups, members]; of a permute the pairs."""
    every = np.arange(int(np.prod(list(mesh_shape.values()))))
    if pairs := re.search(r"source_target_pairs=\{([\d,{}]*)\}", attributes):
        return _lists(pairs[1])
    if lists := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes):
        return _lists(lists[1])
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, grid, order = (tuple(map(int, part.split(","))) if part else None for part in iota.groups())
        return np.arange(int(np.prod(grid))).reshape(grid).transpose(order).reshape(shape)
    if named := re.search(r"replica_groups=@?\w*?(?:mesh)?\[([^\]]*)\]\s*(.*?)\{([^}]*)\}", attributes):
        sizes = {name: int(number) for name, number in re.findall(r"'([^']+)'=(\d+)", named[1])}
        return _named(sizes, named[3])
    return every[None]


def _lists(text: str) -> np.ndarray:
    return np.array([[int(number) for number in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)])


def _named(sizes: Mapping[str, int], axes: str) -> np.ndarray:
    """Groups along axes of a mesh, `'axis_1'`, or along part of one: `'axis_0':(2)4` is 4 of it, with 2 before."""
    dims, along = [], []
    parts = {name: (int(before), int(number)) for name, before, number in re.findall(r"'([^']+)':\((\d+)\)(\d+)", axes)}
    whole = re.findall(r"'([^']+)'(?!:)", axes)
    for name, number in sizes.items():
        before, part = parts.get(name, (1, number if name in whole else 1))
        dims += [before, part, number // before // part]
        along += [False, True, False]
    grid = np.arange(int(np.prod(dims))).reshape(dims)
    order = [i for i, yes in enumerate(along) if not yes] + [i for i, yes in enumerate(along) if yes]
    members = int(np.prod([dim for dim, yes in zip(dims, along, strict=True) if yes]))
    return grid.transpose(order).reshape(-1, members)


def axes_of(groups: np.ndarray, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes along which the devices of a group, or of a pair, differ."""
    places = np.stack(np.unravel_index(groups, tuple(mesh_shape.values())))  # [axes, groups, members]
    differ = np.any(places != places[..., :1], axis=(1, 2))
    return tuple(axis for axis, yes in zip(mesh_shape, differ, strict=True) if yes)


def _bytes(kind: str, has: int, members: int) -> tuple[int, int]:
    """(what a device sends, what is gathered or reduced), of the bytes that it has before."""
    if kind == "all-gather":
        return has * (members - 1), has * members
    share = {"all-reduce": 2, "reduce-scatter": 1, "all-to-all": 1}.get(kind)
    return (has if share is None else share * has * (members - 1) // members), has


def _together(a: Collective, b: Collective) -> Collective:
    larger = a if a.largest >= b.largest else b
    return larger._replace(count=a.count + b.count, bytes=a.bytes + b.bytes)
