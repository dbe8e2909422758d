"""One device's pass over all pairs on an NVIDIA GPU: Pallas (Triton) kernels, forward and backward.

`block` has the equations. One kernel runs twice, for rows and for columns, with swapped roles. A program keeps the
results of one side's block in registers while the other side passes: nothing is written twice, and no atomics are
needed. A program of the backward pass computes a part of the width, and recomputes the logits.

The tests interpret the kernels and lower them for CUDA. No GPU has timed the kernels, so they are not the default.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from vlm_jax.kernels.contrastive import block, blockwise
from vlm_jax.kernels.contrastive.block import IGNORED_COLUMN, IGNORED_ROW, Side, Spec, Stats

SIZE = 64
"""Size of a block on both sides, and of the steps along the width."""

GATHERED = 256
"""Largest part of the width for one program of the backward pass."""


def lacks(x, y):
    """Returns in words why the kernels do not support these embeddings; None if they do."""
    del y  # has x's dtype
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"dtype {x.dtype} (float32, bfloat16 and float16 only)"
    return None


def forward(spec: Spec, scale: jax.Array, x: Side, y: Side, *, interpret=False) -> tuple[Stats, Stats]:
    """Returns the stats of rows [N] and columns [M]."""
    results = []
    for own, other, row in _both(x, y):
        out = block.empty(spec, len(own.z), jnp.float32, row=row)
        vector = pl.BlockSpec((SIZE,), lambda i: (i,))
        kernel = functools.partial(_forward, spec=spec, row=row)
        run = functools.partial(_call, kernel, "contrastive_gpu_forward", (len(own.z) // SIZE,), interpret)
        results.append(run(out, jax.tree.map(lambda _, v=vector: v, out), scale, own, other))
    return _first(results[0], len(x.z)), _first(results[1], len(y.z))


def backward(spec: Spec, scale: jax.Array, x: Side, y: Side, *, interpret=False):
    """Returns d y [N, D], d^T x [M, D] and, for the sigmoid, the sum of d over columns [N]; see `block`."""
    results = []
    for own, other, row in _both(x, y):
        size, width = own.z.shape
        part = min(GATHERED, width)
        sums = jnp.zeros((width // part, size)) if row and spec.penalty == "sigmoid" else None
        specs = (
            pl.BlockSpec((SIZE, part), lambda i, k: (i, k)),
            None if sums is None else pl.BlockSpec((None, SIZE), lambda i, k: (k, i)),
        )
        kernel = functools.partial(_backward, spec=spec)
        run = functools.partial(_call, kernel, "contrastive_gpu_backward", (size // SIZE, width // part), interpret)
        results.append(run((jnp.zeros(own.z.shape, jnp.float32), sums), specs, scale, own, other))
    ((to_rows, sums), (to_columns, _)), width = results, x.z.shape[1]
    return to_rows[: len(x.z), :width], to_columns[: len(y.z), :width], None if sums is None else sums[0, : len(x.z)]


def _both(x, y):
    """Returns (own side, other side, whether own is rows) for both roles, padded to whole blocks."""
    pad = lambda side, label: _widen(blockwise.pad(side, pl.cdiv(len(side.z), SIZE) * SIZE, label))
    x, y = pad(x, IGNORED_ROW), pad(y, IGNORED_COLUMN)
    return (x, y, True), (y, x, False)


def _widen(side):
    """Appends zeros to the embeddings until their parts are powers of two, as Triton requires."""
    width = side.z.shape[1]
    part = min(GATHERED, max(SIZE, pl.next_power_of_2(width)))
    return side._replace(z=jnp.pad(side.z, ((0, 0), (0, -width % part))))


def _first(tree, size):
    return jax.tree.map(lambda a: a[:size], tree)


def _call(kernel, name, grid, interpret, out, specs, scale, own, other):
    if not jax.tree.leaves(out):
        return out
    varying = jax.typeof(own.z).manual_axis_type
    return pl.pallas_call(
        kernel,
        name=name,
        grid=grid,
        out_specs=specs,
        out_shape=jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, manual_axis_type=varying), out),
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
    )(scale.reshape(1), own, other)


def _forward(scale, own, other, *out, spec, row):
    rows, own = _own(own)
    start = block.empty(spec, SIZE, jnp.float32, row=row)

    def step(j, carry):
        logits, match = _logits(scale[0], own, other, rows, _block(j))
        best, part = (lambda where: jnp.max(jnp.where(where, logits, block.LOWEST), 1)), {}
        if spec.best:
            part |= dict(best_positive=best(match), best_negative=best(~match))
        if spec.positives:
            part["positive_sum"] = jnp.sum(jnp.where(match, logits, 0.0), 1)
            part["positive_count"] = jnp.sum(jnp.where(match, 1.0, 0.0), 1)
        if spec.penalty == "softmax":
            part["max"] = jnp.max(logits, 1)
            part["sum"] = jnp.sum(jnp.exp(logits - part["max"][:, None]), 1)
        elif row:
            worse = jnp.where(match, -logits, logits)
            part["loss"] = jnp.sum(jnp.maximum(worse, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(worse))), 1)
        return block.merge(carry, Stats(**part))

    stats = jax.lax.fori_loop(0, len(other.z) // SIZE, step, start)
    for ref, values in zip(out, stats, strict=True):
        if ref is not None:
            ref[...] = values


def _backward(scale, own, other, gathered, sums, *, spec):
    rows, own = _own(own)
    part = pl.ds(pl.program_id(1) * gathered.shape[1], gathered.shape[1])

    def step(j, carry):
        columns = _block(j)
        logits, match = _logits(scale[0], own, other, rows, columns)
        if spec.penalty == "sigmoid":
            weight = other.weight[columns] if own.weight is None else own.weight[:, None]
            d = jnp.where(match, -weight, weight) * jax.nn.sigmoid(jnp.where(match, -logits, logits))
        else:
            d = own.weight[:, None] * jnp.exp(logits - own.max[:, None])
            d += other.weight[columns] * jnp.exp(logits - other.max[columns])
            if spec.positives:
                d += jnp.where(match, own.positive[:, None] + other.positive[columns], 0.0)
        z = other.z[columns, part]
        return carry[0] + _dot(d.astype(z.dtype), z), carry[1] + jnp.sum(d, 1)

    start = jnp.zeros(gathered.shape, jnp.float32), jnp.zeros(SIZE, jnp.float32)
    gathered[...], total = jax.lax.fori_loop(0, len(other.z) // SIZE, step, start)
    if sums is not None:
        sums[...] = total


def _block(i):
    return pl.ds(i * SIZE, SIZE)


def _own(side):
    """Returns (rows of this program's block, the block's side); z stays unread."""
    rows = _block(pl.program_id(0))
    return rows, Side(side.z, *(None if ref is None else ref[rows] for ref in side[1:]))


def _dot(a, b):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _logits(scale, own, other, rows, columns):
    """Returns (logits of two blocks, which pairs are positives, or None without labels)."""

    def along(k, products):
        return products + _dot(own.z[rows, _block(k)], other.z[columns, _block(k)].T)

    steps = other.z.shape[1] // SIZE
    logits = scale * jax.lax.fori_loop(0, steps, along, jnp.zeros((SIZE, SIZE), jnp.float32))
    if own.add is not None:
        logits += own.add[:, None]
    if other.add is not None:
        logits += other.add[columns]
    return logits, None if own.labels is None else own.labels[:, None] == other.labels[columns]
