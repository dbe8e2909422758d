"""One device's pass over all pairs on a TPU: the Pallas (Mosaic) kernels, forward and backward.

Equations and rounding are the same as in `block`; only the order of sums differs.

Memory order: a block of rows and its d y stay on chip while blocks of columns pass. The columns' results over all rows
(partial results; d^T x in fp32) stay on chip throughout, and leave with the last block of rows. If these results do not
fit, columns are cut into slabs, with one call for each slab.

Layout: logits have rows along sublanes and columns along lanes. A row has partial results for each lane [rows, 128], a
column for each sublane [8, columns], so that elementwise operations update them. Lanes and sublanes are reduced once,
after the last block. A row's vectors are broadcast over 128 lanes once per block of rows.

A block's logits are computed in chunks of columns: the compiler overlaps the matrix products of one chunk with the
exponentials of another.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec

from vlm_jax.kernels.contrastive import block, blockwise
from vlm_jax.kernels.contrastive.block import IGNORED_COLUMN, IGNORED_ROW, LOWEST, Side, Spec, Stats

LANES, SUBLANES = 128, 8
ROWS, COLUMNS, CHUNK = 1024, 1024, 512
"""Largest rows and columns of a block (bf16; half in fp32), and columns of a chunk."""

BLOCK_BYTES, SLAB_BYTES, VMEM_LIMIT = 5 << 19, 24 << 20, 100 << 20
"""Largest size of a block's embeddings, of a slab's d^T x, and of all data on chip."""

WIDEST = 4096
MAXIMA = ("max", "best_positive", "best_negative")
"""`Stats` that merge by maximum; all others are sums."""

NT, NN, TN = (((1,), (1,)), ((), ())), (((1,), (0,)), ((), ())), (((0,), (0,)), ((), ()))


def lacks(x, y):
    """Returns in words why the kernels do not support these embeddings; None if they do."""
    del y  # has x's dtype and width
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"dtype {x.dtype} (float32 and bfloat16 only)"
    return f"embeddings of width {x.shape[1]} ({WIDEST} at most)" if x.shape[1] > WIDEST else None


def _on_each_device(sweep):
    """Under a mesh, outside `shard_map`, makes every device do all pairs: XLA cannot partition Mosaic kernels."""

    @functools.wraps(sweep)
    def run(spec, *arrays, interpret=False):
        mesh = jax.sharding.get_abstract_mesh()
        free = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual}
        here = functools.partial(sweep, spec, interpret=interpret)
        if all(mesh.shape[name] == 1 for name in free):
            return here(*arrays)
        whole = PartitionSpec()
        return jax.shard_map(
            here, mesh=mesh, in_specs=whole, out_specs=whole, axis_names=free, check_vma=False
        )(*arrays)  # fmt: skip

    return run


@_on_each_device
def forward(spec: Spec, scale: jax.Array, x: Side, y: Side, *, interpret=False) -> tuple[Stats, Stats]:
    """Returns the stats of rows [N] and columns [M]."""
    n, m = len(x.z), len(y.z)
    x, slabs, blocks = _blocks(x, y)
    empty = functools.partial(block.empty, spec, dtype=jnp.float32)

    def of_slab(y):
        out = empty(len(x.z), row=True), empty(len(y.z), row=False)
        shapes = (blocks[0], LANES), (len(y.z) // blocks[1], SUBLANES, blocks[1])
        parts = [_vmem(shape, of) for shape, of in zip(shapes, out, strict=True)]
        results = _call(_forward, "contrastive_forward", spec, blocks, scale, x, y, out, parts, interpret)
        return jax.tree.map(lambda a: a[0], results)

    rows, columns = _each_slab(of_slab, block.merge, empty(len(x.z), row=True), slabs)
    return _first(rows, n), _first(columns, m)


@_on_each_device
def backward(spec: Spec, scale: jax.Array, x: Side, y: Side, *, interpret=False):
    """Returns d y [N, D], d^T x [M, D] and, for the sigmoid, the sum of d over columns [N]; see `block`."""
    n, m = len(x.z), len(y.z)
    x, slabs, blocks = _blocks(x, y)
    zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
    start = zeros(*x.z.shape), zeros(len(x.z)) if spec.penalty == "sigmoid" else None

    def of_slab(y):
        out = start, zeros(*y.z.shape)
        parts = _vmem(y.z.shape, out[1]), _vmem((blocks[0], LANES), start[1])
        results = _call(_backward, "contrastive_backward", spec, blocks, scale, x, y, out, parts, interpret)
        (to_rows, sums), to_columns = results
        return (to_rows, jax.tree.map(lambda a: a[0], sums)), to_columns

    add = functools.partial(jax.tree.map, jnp.add)
    rows, to_columns = _each_slab(of_slab, add, start, slabs)
    to_rows, sums = _first(rows, n)
    return to_rows, to_columns[:m], sums


def _blocks(x, y):
    """Returns x in whole blocks, y as slabs [slabs, columns, ...] of whole blocks, and (rows, columns) of a block."""
    n, m, width = len(x.z), len(y.z), -(-x.z.shape[1] // LANES) * LANES
    itemsize = x.z.dtype.itemsize
    fits = lambda most: min(most * 2 // itemsize, BLOCK_BYTES // (width * itemsize))
    rows, columns = _even(n, fits(ROWS)), _even(m, fits(COLUMNS))
    many = pl.cdiv(m, columns)
    slabs = pl.cdiv(many, max(1, SLAB_BYTES // (4 * width * columns)))
    slab = pl.cdiv(many, slabs) * columns
    y = blockwise.pad(y, slabs * slab, IGNORED_COLUMN)
    y = jax.tree.map(lambda a: a.reshape(slabs, slab, *a.shape[1:]), y)
    return blockwise.pad(x, pl.cdiv(n, rows) * rows, IGNORED_ROW), y, (rows, columns)


def _vmem(shape, like):
    """Returns fp32 scratch for each array."""
    return jax.tree.map(lambda _: pltpu.VMEM(shape, jnp.float32), like)


def _first(tree, size):
    return jax.tree.map(lambda a: a[:size], tree)


def _even(size, most):
    """Returns the size of equal blocks of whole lane tiles, at most `most`."""
    return pl.cdiv(pl.cdiv(size, pl.cdiv(size, max(LANES, most // LANES * LANES))), LANES) * LANES


def _each_slab(run, merge, start, slabs):
    """Returns (results of rows over all slabs, results of columns); one slab needs no merging."""
    if len(slabs.z) == 1:
        return run(jax.tree.map(lambda a: a[0], slabs))

    def step(rows, slab):
        here, there = run(slab)
        return merge(rows, here), there

    rows, columns = jax.lax.scan(step, start, slabs)
    return rows, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), columns)


def _call(kernel, name, spec, blocks, scale, x, y, out, parts, interpret):
    """Runs a kernel over (blocks of rows, blocks of columns).

    Results are like `out` = (of rows, of columns), with vectors [1, n]. Scratch holds the vectors of a block's rows,
    broadcast over all lanes, and `parts`.
    """
    grid = len(x.z) // blocks[0], len(y.z) // blocks[1]
    last = grid[0] - 1
    of_row, of_column = (lambda i, j: i), (lambda i, j: j)
    at_last = lambda i, j: jnp.where(i == last, j, 0)  # columns' results are written once

    def specs(tree, size, at):
        vector, matrix = (lambda i, j: (0, at(i, j))), (lambda i, j: (at(i, j), 0))
        pick = lambda a: pl.BlockSpec(*(((1, size), vector) if a.ndim == 1 else ((size, a.shape[1]), matrix)))
        return jax.tree.map(pick, tree)

    flat = lambda tree: jax.tree.map(lambda a: a[None] if a.ndim == 1 else a, tree)
    varying = jax.typeof(x.z).manual_axis_type
    result = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, manual_axis_type=varying)
    return pl.pallas_call(
        functools.partial(kernel, spec=spec),
        name=name,
        grid=grid,
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            specs(x, blocks[0], of_row),
            specs(y, blocks[1], of_column),
        ],
        out_specs=(specs(out[0], blocks[0], of_row), specs(out[1], blocks[1], at_last)),
        out_shape=jax.tree.map(result, jax.eval_shape(flat, tuple(out))),
        scratch_shapes=(jax.tree.map(lambda a: pltpu.VMEM((blocks[0], LANES), a.dtype), x._replace(z=None)), *parts),
        interpret=interpret,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
    )(scale.reshape(1), flat(x), flat(y))


def _forward(scale, x, y, rows, columns, over, of_rows, of_columns, *, spec):
    i, j = pl.program_id(0), pl.program_id(1)

    @pl.when(j == 0)
    def _():
        _spread(x, over)
        _clear(of_rows, ...)

    @pl.when(i == 0)
    def _():
        _clear(of_columns, j)

    z = x.z[...]
    for chunk in _chunks(y):
        logits, match = _logits(scale[0], z, y, over, chunk)
        values = {}
        if spec.best:
            values["best_positive"] = jnp.where(match, logits, LOWEST)
            values["best_negative"] = jnp.where(match, LOWEST, logits)
        if spec.positives:
            values["positive_sum"] = jnp.where(match, logits, 0.0)
            values["positive_count"] = jnp.where(match, 1.0, 0.0)
        if spec.penalty == "sigmoid":
            worse = jnp.where(match, -logits, logits)
            values["loss"] = jnp.maximum(worse, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(worse)))
        sides = (
            (of_rows, (slice(None), slice(None)), _fold_lanes, _over_lanes),
            (of_columns, (j, slice(None), chunk), _fold_sublanes, _over_sublanes),
        )
        if spec.penalty == "softmax":
            tops = [jnp.maximum(parts.max[at], fold(jnp.maximum, logits)) for parts, at, fold, _ in sides]
            for (parts, at, fold, unfold), top in zip(sides, tops, strict=True):
                shares = fold(jnp.add, jnp.exp(logits - unfold(top, logits)))
                parts.sum[at] = parts.sum[at] * jnp.exp(parts.max[at] - top) + shares
                parts.max[at] = top
        for parts, at, fold, _ in sides:
            for name, value in values.items():
                ref, op = getattr(parts, name), jnp.maximum if name in MAXIMA else jnp.add
                if ref is not None:
                    ref[at] = op(ref[at], fold(op, value))

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        _meet(rows, of_rows, lambda ref: ref[...].T)

    @pl.when(i == pl.num_programs(0) - 1)
    def _():
        _meet(columns, of_columns, lambda ref: ref[j])


def _backward(scale, x, y, to_rows, to_columns, over, gathered, sums, *, spec):
    i, j = pl.program_id(0), pl.program_id(1)
    to_rows, total = to_rows
    here = pl.ds(j * len(y.z), len(y.z))

    @pl.when(j == 0)
    def _():
        _spread(x, over)
        to_rows[...] = jnp.zeros_like(to_rows)
        if sums is not None:
            sums[...] = jnp.zeros_like(sums)

    @pl.when(i == 0)
    def _():
        gathered[here] = jnp.zeros(to_columns.shape, jnp.float32)

    z, parts = x.z[...], []
    for chunk in _chunks(y):
        logits, match = _logits(scale[0], z, y, over, chunk)
        wide = lambda ref, logits=logits: _over_lanes(ref[...], logits)
        if spec.penalty == "sigmoid":
            weight = wide(over.weight)
            d = jnp.where(match, -weight, weight) * jax.nn.sigmoid(jnp.where(match, -logits, logits))
            sums[...] += _fold_lanes(jnp.add, d)
        else:
            of_row = wide(over.weight) * jnp.exp(logits - wide(over.max))
            d = of_row + y.weight[:, chunk] * jnp.exp(logits - y.max[:, chunk])
            if spec.positives:
                d += jnp.where(match, wide(over.positive) + y.positive[:, chunk], 0.0)
        parts.append(d.astype(z.dtype))
    d = jnp.concatenate(parts, 1)
    to_rows[...] += _dot(d, y.z[...], NN)
    gathered[here] += _dot(d, z, TN)

    if sums is not None:

        @pl.when(j == pl.num_programs(1) - 1)
        def _():
            total[...] = jnp.sum(sums[...].T, 0, keepdims=True)

    @pl.when(i == pl.num_programs(0) - 1)
    def _():
        to_columns[...] = gathered[here]


def _chunks(y):
    return [slice(start, min(start + CHUNK, len(y.z))) for start in range(0, len(y.z), CHUNK)]


def _dot(a, b, dimensions):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, dimensions, precision, preferred_element_type=jnp.float32)


def _logits(scale, z, y, over, chunk):
    """Returns (logits [rows, columns of the chunk], which pairs are positives, or None without labels)."""
    logits = scale * _dot(z, y.z[chunk], NT)
    if over.add is not None:
        logits += _over_lanes(over.add[...], logits)
    if y.add is not None:
        logits += y.add[:, chunk]
    return logits, None if y.labels is None else _over_lanes(over.labels[...], logits) == y.labels[:, chunk]


def _spread(x, over):
    """Broadcasts the rows' vectors into all lanes: [1, rows] -> [rows, 128]."""
    for vector, into in zip(x, over, strict=True):
        if into is not None:
            into[...] = jnp.broadcast_to(vector[...], (LANES, vector.shape[1])).T


def _clear(parts, at):
    for name, ref in zip(Stats._fields, parts, strict=True):
        if ref is not None:
            ref[at] = jnp.full(ref.shape[-2:], LOWEST if name in MAXIMA else 0.0, jnp.float32)


def _meet(results, parts, read):
    """Reduces each ref's partial results, `read(ref)` [parts, n], to [1, n]."""
    for name, ref, result in zip(Stats._fields, parts, results, strict=True):
        if ref is None:
            continue
        values = read(ref)
        if name == "sum":
            values *= jnp.exp(read(parts.max) - results.max[...])
        result[...] = (jnp.max if name in MAXIMA else jnp.sum)(values, 0, keepdims=True)


def _fold_lanes(op, a):
    return functools.reduce(op, [a[:, start : start + LANES] for start in range(0, a.shape[1], LANES)])


def _fold_sublanes(op, a):
    return {jnp.maximum: jnp.max, jnp.add: jnp.sum}[op](a.reshape(-1, SUBLANES, a.shape[1]), 0)


def _over_lanes(a, like):
    return jnp.concatenate([a] * (like.shape[1] // LANES), 1)


def _over_sublanes(a, like):
    return jnp.concatenate([a] * (like.shape[0] // SUBLANES), 0)
