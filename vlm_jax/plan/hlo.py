"""Reads the text of a compiled program (HLO): instructions, their number of runs, their HBM traffic.

Only instructions that run count: the entry computation and the loops in it, a loop's body once for each turn. XLA's
`cost_analysis` counts a body once.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
SLICES = ("dynamic-slice", "slice", "slice-start", "gather")  # read no more of their first operand than they return
MOVES_NOTHING = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier",
}  # fmt: skip
# Custom calls of TPU programs that do no work, and the two ends of a collective that runs beside a fusion.
MARKERS = {
    "AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "AsyncCollectiveStart", "AsyncCollectiveDone",
}  # fmt: skip


class Instruction(NamedTuple):
    """`%name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    literal: str = ""  # of a constant its value, of a parameter its place

    @property
    def kind(self) -> str:
        """The opcode, without the `-start` of an asynchronous operation."""
        return self.opcode.removesuffix("-start")

    def called(self, key: str = "calls") -> str:
        """The name of a computation that the instruction calls, "" for none."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else ""


class Computation(NamedTuple):
    """Instructions by name, and the name of the instruction that makes the result."""

    instructions: dict[str, Instruction]
    root: str

    def users(self, name: str) -> Iterator[tuple[Instruction, int]]:
        """(instruction, the place of the operand) for each use of a value."""
        for instruction in self.instructions.values():
            yield from ((instruction, i) for i, operand in enumerate(instruction.operands) if operand == name)


class Program(NamedTuple):
    """All computations of a program by name, and the name of the entry computation."""

    computations: dict[str, Computation]
    entry: str

    def steps(self, name: str | None = None, times: int = 1) -> Iterator[tuple[Computation, Instruction, int]]:
        """(computation, instruction, number of runs); enters loops and all branches of conditionals, but no fusions."""
        computation = self.computations[name or self.entry]
        for instruction in computation.instructions.values():
            yield computation, instruction, times
            if instruction.opcode == "while":
                yield from self.steps(instruction.called("body"), times * self._turns(computation, instruction))
            elif instruction.opcode == "call":
                yield from self.steps(instruction.called("to_apply"), times)
            elif instruction.opcode == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
                names = re.findall(r"[\w.\-]+", branches[1]) if branches else ()
                names = names or [instruction.called(f"{value}_computation") for value in ("true", "false")]
                for branch in names:
                    yield from self.steps(branch, times)

    def _turns(self, computation: Computation, loop: Instruction) -> int:
        """The trip count from XLA, else from the condition `counter < constant`; 1 for any other condition."""
        known = re.search(r'known_trip_count"?[:=]\s*\{"?n"?[:=]"?(\d+)', loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations[loop.called("condition")].instructions
        limits = [value for value in map(_constant, condition.values()) if value is not None]
        compares = [i for i in condition.values() if i.opcode == "compare" and "direction=LT" in i.attributes]
        if len(limits) != 1 or len(compares) != 1:
            return 1
        counter = condition[compares[0].operands[0]]
        index = re.search(r"index=(\d+)", counter.attributes)
        first = computation.instructions[loop.operands[0]]
        start = None
        if index and first.opcode == "tuple":
            start = _constant(computation.instructions[first.operands[int(index[1])]])
        return limits[0] - (start or 0)


def parse(text: str) -> Program:
    """The program of `compiled.as_text()`."""
    computations, entry, name, current, root = {}, "", "", {}, ""
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line)
        if header:
            name, current, root = header[2], {}, ""
            entry = name if header[1] else entry
        elif line.startswith("}"):
            computations[name] = Computation(current, root)
        elif found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line):
            instruction = _instruction(found[2], line[found.end() :])
            current[instruction.name] = instruction
            root = instruction.name if found[1] else root
    return Program({name: _slices_named(one, computations) for name, one in computations.items()}, entry)


def arrays(type_: str) -> list[tuple[int, bool]]:
    """(bytes, whether in HBM) of each array of a type.

    S(n) in a layout is another memory, such as VMEM or semaphores. Padding to tiles is left out.
    """
    found = re.findall(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?", type_)
    elements = lambda dims: math.prod(int(dim) for dim in dims.split(",") if dim)
    return [(_bits(kind) * elements(dims) // 8, "S(" not in layout) for kind, dims, layout in found]


def shapes(type_: str) -> list[tuple[int, ...]]:
    """The shape of each array of a type."""
    return [tuple(map(int, dims.split(","))) if dims else () for dims in re.findall(r"[a-z]\w*\[([\d,]*)\]", type_)]


def size(type_: str) -> int:
    """Bytes of all arrays of a type."""
    return sum(number for number, _ in arrays(type_))


def hbm_bytes(program: Program) -> int:
    """Bytes that a device reads from and writes to HBM in a run of the program, a lower bound.

    Operands and results of each fusion, kernel and copy count once; of an array that is sliced or updated in place only
    that part counts. Collectives' own traffic and repeated reads of a kernel are left out.
    """
    return sum(times * moved(program, computation, one) for computation, one, times in program.steps())


def moved(program: Program, computation: Computation, instruction: Instruction) -> int:
    """Bytes that one instruction reads from and writes to HBM, as `hbm_bytes` counts them."""
    total = 0
    for place, operand in enumerate(instruction.operands):
        held = arrays(computation.instructions[operand].type)
        if all(in_hbm for _, in_hbm in held):
            total += _read(program, computation, instruction, place)
    written, held = _written(program, computation, instruction), arrays(instruction.type)
    return total + sum(min(n, most) for n, (most, in_hbm) in zip(written, held, strict=False) if in_hbm)


def _read(program: Program, computation: Computation, instruction: Instruction, place: int) -> int:
    """Bytes that an instruction reads of one operand."""
    whole = size(computation.instructions[instruction.operands[place]].type)
    if moves_nothing(instruction) or instruction.opcode.endswith("-done"):
        return 0
    if instruction.opcode in SLICES and place == 0:
        out = arrays(instruction.type)
        return min(whole, out[1][0] if instruction.opcode == "slice-start" else out[0][0])
    if instruction.opcode in ("dynamic-update-slice", "scatter") and place == 0:
        return 0  # in place
    if instruction.opcode == "fusion":
        inner = program.computations[instruction.called()]
        given = next(i for i in inner.instructions.values() if i.opcode == "parameter" and i.literal == str(place))
        return min(whole, _used(program, inner, given.name))
    return whole


def _used(program: Program, inner: Computation, name: str) -> int:
    """Bytes that a fusion reads of one of its values."""
    total = 0
    for user, place in inner.users(name):
        through = user.opcode == "bitcast"
        total += _used(program, inner, user.name) if through else _read(program, inner, user, place)
    return total


def _written(program: Program, computation: Computation, instruction: Instruction) -> list[int]:
    """Bytes that an instruction writes of each array of its result."""
    if instruction.opcode == "fusion":
        inner = program.computations[instruction.called()]
        return _made(program, inner, inner.instructions[inner.root])
    if moves_nothing(instruction) or instruction.opcode.endswith("-start"):
        return []
    if instruction.opcode in ("dynamic-update-slice", "scatter"):
        return [size(computation.instructions[instruction.operands[-1 if instruction.opcode == "scatter" else 1]].type)]
    return [number for number, _ in arrays(instruction.type)]


def _made(program: Program, inner: Computation, root: Instruction) -> list[int]:
    """Bytes that a fusion writes of each array of its result; 0 for an array that the fusion passes on."""
    if root.opcode == "tuple":
        return [n for name in root.operands for n in _made(program, inner, inner.instructions[name])]
    if root.opcode == "bitcast":
        return _made(program, inner, inner.instructions[root.operands[0]])
    return _written(program, inner, root) or [0] * len(arrays(root.type))


def moves_nothing(instruction: Instruction) -> bool:
    """Whether an instruction moves no bytes of the chip's own memory."""
    target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    collective = instruction.opcode.removesuffix("-done").removesuffix("-start") in COLLECTIVES
    return collective or instruction.opcode in MOVES_NOTHING or bool(target and target[1] in MARKERS)


def _slices_named(computation: Computation, computations: dict[str, Computation]) -> Computation:
    """Renames the `async-start` and `async-done` of a slice to `slice-start` and `slice-done`; HLO uses both forms."""
    named = {}
    for name, one in computation.instructions.items():
        inner = computations.get(one.called()) if one.opcode == "async-start" else None
        if inner and inner.instructions[inner.root].opcode == "slice":
            one = one._replace(opcode="slice-start")
        elif one.opcode == "async-done" and named[one.operands[0]].opcode == "slice-start":
            one = one._replace(opcode="slice-done")
        named[name] = one
    return computation._replace(instructions=named)


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    opcode, _, _ = rest[end:].lstrip().partition("(")
    start = rest.index("(", end)
    close = _closing(rest, start)
    inside = rest[start + 1 : close - 1]
    if opcode in ("parameter", "constant"):
        return Instruction(name, rest[:end], opcode, (), rest[close:], inside)
    return Instruction(name, rest[:end], opcode, tuple(re.findall(r"%([\w.\-]+)", inside)), rest[close:])


def _closing(text: str, start: int) -> int:
    """The place after the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return start + found.end()
    raise ValueError(f"no closing parenthesis in {text[start : start + 80]}")


def _constant(instruction: Instruction) -> int | None:
    number = instruction.opcode == "constant" and instruction.literal.lstrip("-").isdigit()
    return int(instruction.literal) if number else None


def _bits(kind: str) -> int:
    if kind == "pred":
        return 8
    number = re.search(r"\d+", kind)
    return int(number[0]) if number else 0
