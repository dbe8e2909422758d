"""The collectives of a compiled program: kinds, mesh axes, bytes."""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from vlm_jax.plan.hlo import COLLECTIVES, Computation, Instruction, Program, moved, moves_nothing, shapes, size

PRODUCTS = ("convolution", "dot")
WORK = (*PRODUCTS, "custom-call", "call")


class Collective(NamedTuple):
    """The collectives of a step with the same kind, axes and asynchrony.

    Attributes:
      kind: the HLO operation.
      axes: mesh axes along which the members of a group differ.
      asynchronous: whether work that could hide the collective is scheduled between its start and its end.
      count: runs in a step; collectives that XLA has combined count once.
      bytes: bytes that a device sends in a step, by a ring. An all-reduce of n bytes in groups of g sends
        2 n (g - 1) / g; a reduce-scatter or all-to-all half of that; an all-gather (g - 1) times the device's part; a
        permute the device's array.
      largest: bytes of the largest array, or combined arrays, that one collective gathers or reduces.
      where: the name of the traced operation behind that collective.
    """

    kind: str
    axes: tuple[str, ...]
    asynchronous: bool
    count: int
    bytes: int
    largest: int
    where: str


def collectives(program: Program, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """All collectives of a program on a mesh, the most bytes first.

    Args:
      program: the result of `hlo.parse`.
      mesh_shape: sizes of the mesh's axes; device i of the program is device i of the flattened mesh.
    """
    found: dict[tuple, Collective] = {}
    for one, *_ in each(program, mesh_shape):
        key = one.kind, one.axes, one.asynchronous
        found[key] = _together(found[key], one) if key in found else one
    return sorted(found.values(), key=lambda one: -one.bytes)


def each(program: Program, mesh_shape: Mapping[str, int]) -> Iterator[tuple[Collective, list[tuple[int, ...]], int]]:
    """(collective, shapes of a device's operands, members of a group) of each collective; arguments as above."""
    for caller, instruction, times in program.steps():
        for computation, inner in _inside(program, caller, instruction):
            groups = groups_of(inner.attributes, mesh_shape)
            axes, members = axes_of(groups, mesh_shape), groups.shape[-1]
            if not axes:
                continue  # each device by itself
            kind = inner.kind
            if kind == "all-reduce" and instruction.called().startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # the form in TPU programs: each device keeps a slice
            given = [computation.instructions[name].type for name in inner.operands]
            sent, largest = _bytes(kind, sum(map(size, given)), members)
            asynchronous = _overlaps(program, caller, instruction, sent)
            where = re.search(r'op_name="([^"]*)"', inner.attributes + instruction.attributes)
            one = Collective(kind, axes, asynchronous, times, times * sent, largest, where[1] if where else "")
            yield one, [shape for type_ in given for shape in shapes(type_)], members


def _inside(program: Program, caller: Computation, instruction: Instruction) -> Iterator[tuple]:
    """(computation, collective) of an instruction: itself, or the collectives that begin in its called computations.

    A TPU runs some collectives beside fusions: a fusion with `AsyncCollectiveStart` begins a collective; fusions with
    another name or marker hold the same collective again, carry it on and end it. Other collectives run on SparseCores,
    in `async-start`.
    """
    if instruction.kind in COLLECTIVES:
        yield caller, instruction
    elif instruction.opcode in ("fusion", "async-start"):
        marks = _marks(program, instruction)
        goes_on = instruction.called().startswith("async_collective_fusion") or "AsyncCollectiveDone" in marks
        if goes_on and "AsyncCollectiveStart" not in marks:
            return
        yield from ((inner, one) for inner, one in _nested(program, instruction) if one.kind in COLLECTIVES)


def _nested(program: Program, instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
    """(computation, instruction) of all instructions in the computations that an instruction calls."""
    calls = r"\b(?:calls=|to_apply=|called_computations=\{)%?([\w.\-]+)"
    for name in re.findall(calls, instruction.attributes):
        for one in program.computations[name].instructions.values() if name in program.computations else ():
            yield program.computations[name], one
            yield from _nested(program, one)


def _overlaps(program: Program, computation: Computation, start: Instruction, sent: int) -> bool:
    """Whether work is scheduled between the start and the end of a collective; a program's text is in order.

    Work is a product, a kernel, a loop, or an instruction that moves at least as many bytes as the collective sends.
    """
    order = list(computation.instructions.values())
    begun = order.index(start)
    if start.opcode == "fusion":
        if "AsyncCollectiveStart" not in _marks(program, start):
            return False
        channel = _channels(program, start)
        ends = lambda one: "AsyncCollectiveDone" in _marks(program, one) and channel & _channels(program, one)
    elif start.opcode.endswith("-start") and '"is_sync":true' not in start.attributes:
        names = {start.name}
        for place, one in enumerate(order):
            if one.opcode == "async-update" and one.operands[0] in names:  # a SparseCore has waited for its operand
                names.add(one.name)
                begun = place
        ends = lambda one: one.opcode.endswith("-done") and one.operands[0] in names
    else:
        return False
    end = next((place for place, one in enumerate(order) if place > begun and ends(one)), begun)
    return any(_works(program, computation, one, sent) for one in order[begun + 1 : end])


def _works(program: Program, computation: Computation, instruction: Instruction, least: int) -> bool:
    if instruction.opcode != "fusion":
        return (instruction.opcode in WORK and not moves_nothing(instruction)) or instruction.opcode == "while"
    products = any(one.opcode in PRODUCTS for _, one in _nested(program, instruction))
    return products or moved(program, computation, instruction) >= max(least, 1)


def _marks(program: Program, instruction: Instruction) -> set[str]:
    """The markers in a fusion that begins or ends a collective."""
    if instruction.opcode != "fusion":
        return set()
    inside = program.computations[instruction.called()].instructions.values()
    found = [re.search(r'custom_call_target="(AsyncCollective\w+)"', one.attributes) for one in inside]
    return {target[1] for target in found if target}


def _channels(program: Program, instruction: Instruction) -> set[str]:
    inside = [one for _, one in _nested(program, instruction) if one.kind in COLLECTIVES]
    return {found[1] for one in inside if (found := re.search(r"channel_id=(\d+)", one.attributes))}


def groups_of(attributes: str, mesh_shape: Mapping[str, int]) -> np.ndarray:
    """The devices that a collective joins, [groups, members]; for a permute the pairs."""
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
    """Groups along mesh axes, `'axis_1'`, or part of an axis: `'axis_0':(2)4` is a part of 4, after a part of 2."""
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
    """(bytes that a device sends, bytes gathered or reduced), from the bytes `has` of a device before."""
    if kind == "all-gather":
        return has * (members - 1), has * members
    share = {"all-reduce": 2, "reduce-scatter": 1, "all-to-all": 1}.get(kind)
    return (has if share is None else share * has * (members - 1) // members), has


def _together(a: Collective, b: Collective) -> Collective:
    larger = a if a.largest >= b.largest else b
    return larger._replace(count=a.count + b.count, bytes=a.bytes + b.bytes)
