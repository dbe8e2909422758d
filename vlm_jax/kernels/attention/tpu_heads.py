"""Reads and writes single heads of packed arrays [B, L, H * D] in a TPU kernel's blocks.

A head is D lanes of the packed arrays:

- D divides 128: `128 / D` heads share a lane tile. Zeroing the other heads' lanes of one operand is enough for
  S^T = K Q^T; the transposed operands are cut along sublanes.
- D is a multiple of 128: a head is whole lane tiles.
- any other D (72, 80, 88, 104): the two lane tiles around the head, rotated so that the head starts at lane 0.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128


class Spec(NamedTuple):
    """Static parameters of a kernel, besides the shapes of its operands."""

    heads: int
    head_dim: int
    causal: bool
    scale: float
    examples: int = 1  # per grid step
    groups: int = 1  # lane tiles (or unaligned heads) per grid step
    ahead: int = 0  # units whose logits are computed before the softmax of the current one
    tile: int = 512  # queries of a unit, in the forward pass
    chunk: int = 1024  # keys of a piece of a unit
    interpret: bool = False

    @property
    def width(self):
        return self.heads * self.head_dim

    @property
    def aligned(self):
        """Whether heads and lane tiles have common boundaries."""
        return LANES % self.head_dim == 0 or self.head_dim % LANES == 0

    @property
    def group_heads(self):
        """Heads of a group: those that share a lane tile."""
        return max(1, LANES // self.head_dim) if self.aligned else 1

    @property
    def total_groups(self):
        return -(-self.heads // self.group_heads)

    @property
    def static(self):
        """Whether a grid step covers all heads, so that every lane offset is known at compile time."""
        return self.groups >= self.total_groups or self.width % LANES != 0 or self.width < 2 * LANES

    @property
    def lagged(self):
        """Whether a grid step rotates the next head into place while it computes the current one."""
        return not self.aligned and not self.static

    @property
    def steps(self):
        """Grid steps per example."""
        return 1 if self.static else -(-self.total_groups // self.groups)


def fits_groups(spec):
    """Returns the spec with the largest number of groups up to `spec.groups` that divides all groups."""
    groups = min(spec.groups, spec.total_groups)
    while spec.total_groups % groups:
        groups -= 1
    return spec._replace(groups=groups)


class Heads:
    """Reads and writes heads in packed refs, one instance per traced kernel; a cache lets heads share operands."""

    lag = 0  # grid steps between fetching a head and computing it

    def __init__(self, spec, dtype):
        self.spec, self.dtype, self.cache = spec, dtype, {}
        self.per_step = spec.total_groups if spec.static else spec.groups
        self.step = 0 if spec.static or spec.lagged else pl.program_id(1)

    def units(self):
        """Yields (example, group, head in group) of this grid step."""
        spec = self.spec
        for b in range(spec.examples):
            for g in range(self.per_step):
                for h in range(min(spec.group_heads, spec.heads - g * spec.group_heads)):
                    yield b, g, h

    def index(self, g, h):
        """Returns the number of a head in the whole array."""
        return (self.step * self.per_step + g) * self.spec.group_heads + h

    def fetch(self):
        """Does nothing: aligned heads need no preparation for the next step."""

    commit = fetch

    def last(self, g, h):
        """Returns whether h is the last head of its group."""
        return h == min(self.spec.group_heads, self.spec.heads - g * self.spec.group_heads) - 1

    def lanes(self, g):
        """Returns the lanes of an aligned group."""
        spec, size = self.spec, self.spec.group_heads * self.spec.head_dim
        if spec.static:
            return slice(g * size, min((g + 1) * size, spec.width))
        return pl.ds(pl.multiple_of((self.step * self.per_step + g) * size, LANES), size)

    def group(self, ref, b, g):
        """Returns the group's heads [L, lanes]; an unaligned head starts at lane 0, other heads' lanes follow."""
        key = (id(ref), b, g)
        if key not in self.cache:
            spec = self.spec
            lanes = self.lanes(g) if spec.aligned else slice(g * spec.head_dim, (g + 1) * spec.head_dim)
            self.cache[key] = ref[b, :, lanes]
        return self.cache[key]

    def only(self, ref, b, g, h):
        """Returns the group with zeros in the lanes of every head but h."""
        value, dim = self.group(ref, b, g), self.spec.head_dim
        if value.shape[1] == dim:
            return value
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, value.shape[1]), 1)
        return jnp.where((lane >= h * dim) & (lane < (h + 1) * dim), value, jnp.zeros_like(value))

    def transposed(self, ref, b, g, h):
        """Returns one head as [D, L]."""
        key = (id(ref), b, g, "T")
        if key not in self.cache:
            self.cache[key] = self.group(ref, b, g).T
        return self.cache[key][h * self.spec.head_dim : (h + 1) * self.spec.head_dim]

    def write(self, ref, b, g, rows, heads):
        """Stores the heads of a group, a list of [D, rows] (transposed) arrays."""
        value = jnp.concatenate(heads, 0) if len(heads) > 1 else heads[0]
        self.write_group(ref, b, g, rows, value.T if self.dtype == jnp.float32 else value.astype(self.dtype).T)

    def write_group(self, ref, b, g, rows, value):
        """Stores [rows, lanes]; ignores lanes past an unaligned head."""
        spec, dim = self.spec, self.spec.head_dim
        if spec.aligned:
            ref[b, rows, self.lanes(g)] = value.astype(ref.dtype)
        else:
            ref[b, rows, g * dim : (g + 1) * dim] = value[:, :dim].astype(ref.dtype)


class LaggedHeads(Heads):
    """Unaligned heads, one a grid step: step n reads head n from HBM's blocks, computes head n - 1, writes head n - 2.

    The cross-lane unit rotates a head into place. Matrix products leave this unit idle, but must wait for the rotation.
    A step therefore computes on scratch. Meanwhile the step writes the results of the previous step, rotates the head
    of the next step and begins the next head's first products (`started`). These tasks are independent. At its end a
    step stores the inputs of the next step in scratch (`commit`).
    """

    lag = 1

    def __init__(self, spec, dtype, refs, results, scratch):
        super().__init__(spec, dtype)
        n, total = pl.program_id(0), pl.num_programs(0) - 2
        self.per_step = 1
        number = lambda lag: jax.lax.rem(jnp.clip(n - lag, 0, total - 1), spec.heads)
        self.coming, self.step, self.gone = number(0), number(1), number(2)
        self.again = n > total  # the last step computes the last head once more
        self.scratch = dict(zip(map(id, (*refs, *results)), scratch, strict=False))
        self.carried = scratch[len(refs) + len(results) :]
        self.fetched, self.written, self.ahead = {}, [], False
        self.tasks = [functools.partial(self.flush, ref) for ref in results]
        self.tasks += [functools.partial(self.rotate, ref) for ref in refs]

    def window(self, head):
        """Returns (first lane, rotation) of the two lane tiles that hold a head."""
        start = head * self.spec.head_dim
        first = jnp.minimum(jax.lax.div(start, LANES) * LANES, self.spec.width - 2 * LANES)
        return pl.ds(pl.multiple_of(first, LANES), 2 * LANES), start - first

    def group(self, ref, b, g):
        if self.ahead:
            while id(ref) not in self.fetched:
                self.fetch()
            return self.fetched[id(ref)]
        return self.scratch[id(ref)][...]

    def fetch(self):
        """Writes one more result of the last step, or reads one more operand of the next step."""
        if self.tasks:
            self.tasks.pop(0)()

    def rotate(self, ref):
        lanes, shift = self.window(self.coming)
        self.fetched[id(ref)] = pltpu.roll(ref[0, :, lanes], 2 * LANES - shift, 1)[:, :LANES]

    def flush(self, ref):
        """Writes the last step's head [D, L] to its lanes of [L, H * D]."""
        (lanes, shift), dim = self.window(self.gone), self.spec.head_dim
        value = self.scratch[id(ref)][...]
        value = jnp.concatenate([value, jnp.zeros((2 * LANES - dim, value.shape[1]), value.dtype)], 0)
        value = pltpu.roll(value.astype(ref.dtype).T, shift, 1)
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, 2 * LANES), 1)
        ref[0, :, lanes] = jnp.where((lane >= shift) & (lane < shift + dim), value, ref[0, :, lanes])

    def write(self, ref, b, g, rows, heads):
        self.written.append((self.scratch[id(ref)], rows, heads[0]))

    def started(self, i, chunks, per_chunk):
        """Returns the previous step's products for unit i: per chunk of keys, `per_chunk` arrays [keys, queries]."""
        refs = self.carried[i * per_chunk : (i + 1) * per_chunk]
        parts = [tuple(ref[chunk] for ref in refs) for chunk in chunks]
        return [part[0] for part in parts] if per_chunk == 1 else parts

    def commit(self, coming=(), chunks=(), per_chunk=1):
        while self.tasks:
            self.fetch()
        for ref, rows, value in self.written:
            ref[:, rows] = value
        for i, parts in enumerate(coming):
            for chunk, part in zip(chunks, parts, strict=True):
                for ref, value in zip(self.carried[i * per_chunk :], (part,) if per_chunk == 1 else part, strict=False):
                    ref[chunk] = value
        for key, value in self.fetched.items():
            self.scratch[key][...] = value
