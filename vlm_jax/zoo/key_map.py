"""Key maps: tables that pair a format's tensors with our parameters, for reading and for writing.

A table is rows `(ours, theirs, kind)`. A kind stands for the arrays of a layer ("dense": a kernel and a bias) and their
layout, see `kinds`. `{i}` is the number of a block. `theirs` may end in `#k/n`: part k of n on the tensor's first axis.
`theirs` may have `*a` in place of the number: blocks are stacked on axis a:

    ("blocks_{i}/attn/query", "encoder.layers.{i}.self_attn.q_proj", "dense")
    ("blocks_{i}/attn/key", "transformer.resblocks.{i}.attn.in_proj#1/3", "in_proj")
    ("blocks_{i}/norm1", "Transformer/encoderblock*0/LayerNorm_0", "flax")
"""

import fnmatch
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from vlm_jax.errors import UserError

FLOATS = tuple(map(np.dtype, (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)))
PIECE = 2**20  # bytes read at a time
SHOWN = 6  # names of left-overs in a message


class Layout(NamedTuple):
    """The layout of their array in terms of ours: our axes are split, then permuted.

    Attributes:
      split: for each of our axes the sizes after splitting; -1 is the rest, () an axis of size 1 that theirs lacks.
        None keeps every axis whole.
      order: for each of their axes the number of a split axis; None keeps the order.
      ones: number of leading axes of size 1 in their array.
    """

    split: tuple[tuple[int, ...], ...] | None = None
    order: tuple[int, ...] | None = None
    ones: int = 0

    def _parts(self, shape: Sequence[int]) -> list[tuple[int, ...]]:
        parts = []
        for size, split in zip(shape, self.split or ((-1,),) * len(shape), strict=True):
            known = math.prod(part for part in split if part > 0)
            parts.append(tuple(size // known if part == -1 else part for part in split))
        return parts

    def _order(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(range(sum(map(len, self._parts(shape))))) if self.order is None else self.order

    def their_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of their array, given the shape of ours."""
        sizes = [size for parts in self._parts(shape) for size in parts]
        return (1,) * self.ones + tuple(sizes[axis] for axis in self._order(shape))

    def their_index(self, shape: Sequence[int], index: Sequence[slice]) -> tuple[list[slice], list[slice]]:
        """Returns the part of their array that covers `index` of ours, and its cut in our axes."""
        wanted, trims = [], []
        for size, parts, cut in zip(shape, self._parts(shape), index, strict=True):
            start, stop, _ = cut.indices(size)
            inner = math.prod(parts[1:])
            first = start // inner
            wanted += [slice(first, -(-stop // inner)), *(slice(0, part) for part in parts[1:])][: len(parts)]
            trims.append(slice(start - first * inner, stop - first * inner) if parts else slice(None))
        return [slice(0, 1)] * self.ones + [wanted[axis] for axis in self._order(shape)], trims

    def first_axis(self, shape: Sequence[int]) -> int | None:
        """Returns the axis of ours that is their whole first axis, or None."""
        parts, order = self._parts(shape), self._order(shape)
        if self.ones or not order:
            return None
        owner = [axis for axis, part in enumerate(parts) for _ in part][order[0]]
        return owner if len(parts[owner]) == 1 else None

    def to_ours(self, array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """Returns their array, or a part from `their_index`, with our axes."""
        array = array.reshape(array.shape[self.ones :]).transpose(np.argsort(self._order(shape)))
        sizes = iter(array.shape)
        return array.reshape([math.prod(next(sizes) for _ in parts) for parts in self._parts(shape)])

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        sizes = [size for parts in self._parts(array.shape) for size in parts]
        return array.reshape(sizes).transpose(self._order(array.shape)).reshape(self.their_shape(array.shape))


class Entry(NamedTuple):
    """One of our parameters and its place in a tensor of theirs.

    Attributes:
      ours: the parameter's name, blocks numbered.
      theirs: the tensor's name.
      layout: layout of the parameter in the tensor (in the part, in the block).
      part: (k, n), array k of n on the tensor's first axis.
      block: (axis, i, depth), block i of depth on that axis of the tensor; or None.
    """

    ours: str
    theirs: str
    layout: Layout
    part: tuple[int, int] = (0, 1)
    block: tuple[int, int, int] | None = None

    def their_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        sizes = list(self.layout.their_shape(shape))
        if self.part[1] > 1:
            sizes[0] *= self.part[1]
        if self.block:
            sizes.insert(self.block[0], self.block[2])
        return tuple(sizes)

    def read(self, tensor: Any, shape: Sequence[int], index: Sequence[slice]) -> np.ndarray:
        """Returns the part `index` of our array of `shape`, from a `tensors.Tensor`."""
        theirs, trims = self.layout.their_index(shape, index)
        if self.part[1] > 1:
            offset = self.part[0] * self.layout.their_shape(shape)[0]
            theirs[0] = slice(offset + theirs[0].start, offset + theirs[0].stop)
        if self.block:
            axis, i, _ = self.block
            theirs.insert(axis, slice(i, i + 1))
        array = tensor.read(tuple(theirs))
        if self.block:
            array = array.squeeze(self.block[0])
        return self.layout.to_ours(array, shape)[tuple(trims)]

    def read_into(self, out: np.ndarray, tensor: Any, shape: Sequence[int], index: Sequence[slice]) -> None:
        """`out[...] = read(...)` in pieces of about `PIECE` bytes, along their first axis."""
        axis = self.layout.first_axis(shape)
        rows = index[axis].stop - index[axis].start if axis is not None else 0
        step = max(int(PIECE / (out.nbytes / rows)), 1) if rows and out.nbytes else 1
        if rows <= step:
            out[...] = self.read(tensor, shape, index)
            return
        for start in range(index[axis].start, index[axis].stop, step):
            piece = slice(start, min(start + step, index[axis].stop))
            place = slice(piece.start - index[axis].start, piece.stop - index[axis].start)
            cut = [*index[:axis], piece, *index[axis + 1 :]]
            out[(slice(None),) * axis + (place,)] = self.read(tensor, shape, cut)

    def write(self, array: np.ndarray, into: np.ndarray) -> None:
        """Puts our array into its place in their whole tensor."""
        if self.block:
            axis, i, _ = self.block
            into = into[(slice(None),) * axis + (i,)]
        if self.part[1] > 1:
            size = into.shape[0] // self.part[1]
            into = into[self.part[0] * size : (self.part[0] + 1) * size]
        into[...] = self.layout.to_theirs(array)


def kinds(heads: int, patch: int, grid: int) -> dict[str, tuple[tuple[str, str, Layout], ...]]:
    """Returns kind -> (our suffix, their suffix, layout) of each array of a layer.

    Args:
      heads: attention heads, for formats with an axis for heads.
      patch: side of a patch, for the layouts of the patch projection.
      grid: rows of the grid of positions, for formats that store a grid.
    """
    same, linear = Layout(), Layout(order=(1, 0))
    conv = Layout(((patch, patch, 3), (-1,)), (3, 2, 0, 1))
    split = (heads, -1)
    pair = lambda kernel: (("/kernel", ".weight", kernel), ("/bias", ".bias", same))
    flax = lambda kernel, bias: (("/kernel", "/kernel", kernel), ("/bias", "/bias", bias))
    return {
        # torch
        "dense": pair(linear),
        "norm": (("/scale", ".weight", same), ("/bias", ".bias", same)),
        "embedding": (("/embedding", ".weight", same),),
        "conv": pair(conv),
        "conv2d": pair(Layout(order=(3, 2, 0, 1))),  # OIHW and HWIO
        "matrix": (("", "", linear),),
        "in_proj": (("/kernel", "_weight", linear), ("/bias", "_bias", same)),  # nn.MultiheadAttention
        # flax
        "flax": (*flax(same, same), ("/scale", "/scale", same), ("/embedding", "/embedding", same)),
        "flax_conv": flax(Layout(((patch, patch, 3), (-1,))), same),
        "flax_heads": flax(Layout(((-1,), split)), Layout((split,))),  # query, key, value: [D, H, D / H]
        "flax_out": flax(Layout((split, (-1,))), same),  # [H, D / H, D]
        "flax_grid": (("", "", Layout(((), (grid, -1), (-1,)))),),  # positions [h, w, D]
        # arrays
        "same": (("", "", same),),
        "vector": (("", "", Layout(((), (), (-1,)))),),  # [1, 1, D] and [D]
        "table": (("", "", Layout(((), (-1,), (-1,)))),),  # [1, L, D] and [L, D]
        "one": (("", "", Layout(ones=1)),),  # a scalar and [1]
    }


def expand(
    rows: Iterable[tuple[str, str, str]],
    ours: str = "",
    theirs: str = "",
    *,
    depth: int = 0,
    heads: int = 1,
    patch: int = 1,
    grid: int = 1,
) -> list[Entry]:
    """Returns the entries of a table.

    Args:
      rows: see the module's docstring.
      ours: prefix of our names ("image/").
      theirs: prefix of their names.
      depth: number of blocks.
      heads: attention heads.
      patch: side of a patch.
      grid: rows of the grid of positions.
    """
    by_kind, entries = kinds(heads, patch, grid), []
    for our_name, their_name, kind in rows:
        name, _, part = their_name.partition("#")
        part = tuple(map(int, part.split("/"))) if part else (0, 1)
        stacked = re.search(r"\*(\d)", name)
        name = re.sub(r"\*\d", "", name)
        for i in range(depth) if "{i}" in our_name else (0,):
            number = lambda text, i=i: text.replace("{i}", str(i))
            block = (int(stacked[1]), i, depth) if stacked else None
            for our_suffix, their_suffix, layout in by_kind[kind]:
                our_array, their_array = ours + number(our_name) + our_suffix, theirs + number(name) + their_suffix
                entries.append(Entry(our_array, their_array, layout, part, block))
    return entries


def is_scanned(name: str) -> bool:
    """Whether a parameter belongs to a scan over blocks: its first axis is the block."""
    return re.search(r"(^|/)blocks/", name) is not None


def blocks_of(name: str, shapes: Mapping[str, Any]) -> tuple[str, int | None]:
    """Returns the parameter that holds the array `name`, and the block's index in a scan (else None)."""
    if name not in shapes and (match := re.search(r"blocks_(\d+)/", name)):
        return name.replace(match[0], "blocks/"), int(match[1])
    return name, None


def array_shape(name: str, shapes: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Returns the shape of the array `name` (blocks numbered) among parameters `shapes`; None if absent."""
    leaf, i = blocks_of(name, shapes)
    if leaf not in shapes:
        return None
    return tuple(shapes[leaf].shape if i is None else shapes[leaf].shape[1:])


def match(
    entries: Iterable[Entry], shapes: Mapping[str, Any], tensors: Mapping[str, Any], ignored: Sequence[str], where: str
) -> dict[str, list[Entry]]:
    """Checks that entries pair parameters and tensors, each exactly once, in shape and dtype.

    Args:
      entries: the format's table; entries without a parameter in the model are skipped.
      shapes: parameter name -> anything with a shape.
      tensors: tensor name -> `tensors.Tensor`.
      ignored: patterns (`fnmatch`) of tensors that no parameter uses.
      where: name of the file in messages.

    Returns:
      parameter name -> its entries, in the order of its blocks.

    Raises:
      UserError: parameters or tensors are left over or differ; the message lists them.
    """
    plan: dict[str, list[Entry]] = {}
    taken: dict[str, set] = {}
    missing, differ = [], []
    for entry in entries:
        shape = array_shape(entry.ours, shapes)
        if shape is None:
            continue
        plan.setdefault(blocks_of(entry.ours, shapes)[0], []).append(entry)
        region = (entry.part, entry.block)
        if region in taken.setdefault(entry.theirs, set()):
            raise AssertionError(f"the table takes {region} of {entry.theirs} twice")
        taken[entry.theirs].add(region)
        tensor = tensors.get(entry.theirs)
        want = entry.their_shape(shape)
        if tensor is None:
            missing.append(f"{entry.ours} (from {entry.theirs})")
        elif tuple(tensor.shape) != want:
            differ.append(f"{entry.theirs} is {_times(tensor.shape)}, {entry.ours} needs {_times(want)}")
        elif tensor.dtype not in FLOATS:
            differ.append(f"{entry.theirs} is {tensor.dtype}, {entry.ours} needs a float")
    for name, leaf in shapes.items():
        rows = leaf.shape[0] if is_scanned(name) else 1
        if len(plan.get(name, ())) != rows:
            missing.append(f"{name} (the format has no place for it)")
    spare = [n for n in tensors if n not in taken and not any(fnmatch.fnmatchcase(n, pattern) for pattern in ignored)]
    problems = []
    if differ:
        problems.append(f"these differ: {listed(differ)}")
    if missing:
        problems.append(f"no tensor for: {listed(missing)}")
    if spare:
        problems.append(f"no parameter for: {listed([f'{n} {_times(tensors[n].shape)}' for n in spare])}")
    if problems:
        raise UserError(f"{where} does not fit the model of its config:\n  " + "\n  ".join(problems))
    return plan


def read(name: str, entries: Sequence[Entry], tensors: Mapping[str, Any], shape: Sequence[int], index: Sequence[slice]):
    """Reads the part `index` of the parameter `name`, of `shape`, as a float32 numpy array.

    Besides the result, memory holds only one piece of about `PIECE` bytes at a time.

    Args:
      name: the parameter's.
      entries: the parameter's, from `match`.
      tensors: tensor name -> `tensors.Tensor`.
      shape: the whole parameter's.
      index: a slice for each axis.
    """
    index = [slice(*cut.indices(size)[:2]) for cut, size in zip(index, shape, strict=True)]
    out = aligned_empty([cut.stop - cut.start for cut in index])
    if not is_scanned(name):
        entries[0].read_into(out, tensors[entries[0].theirs], shape, index)
        return out
    for row, i in zip(out, range(index[0].start, index[0].stop), strict=True):
        entries[i].read_into(row, tensors[entries[i].theirs], shape[1:], index[1:])
    return out


def aligned_empty(shape: Sequence[int]) -> np.ndarray:
    """Returns an uninitialised float32 array, 64-byte aligned: jax on a CPU needs no copy."""
    size = math.prod(shape)
    buffer = np.empty(size + 16, np.float32)
    start = -buffer.ctypes.data % 64 // 4
    return buffer[start : start + size].reshape(shape)


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def listed(items: Sequence[str]) -> str:
    """Returns the first names as text, and the number of the others."""
    more = f", and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(items[:SHOWN]) + more
