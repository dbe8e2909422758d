"""One device's pass over all pairs, block by block: an XLA loop on any platform.

Memory order: rows are the slow loop and stay in cache with their partial results. Columns are the fast loop; their
partial results are updated in place. Memory beyond inputs and results: one block of logits. Padding fills the last
blocks with embeddings that do not count.
"""

import jax
import jax.numpy as jnp

from vlm_jax.kernels.contrastive import block
from vlm_jax.kernels.contrastive.block import IGNORED_COLUMN, IGNORED_ROW, LOWEST, Side, Spec, Stats


def forward(spec: Spec, scale: jax.Array, x: Side, y: Side) -> tuple[Stats, Stats]:
    """Returns the stats of rows [N] and columns [M]."""
    n, m = len(x.z), len(y.z)
    dtype = block.accumulator(x.z)
    rows, columns = blocks(x, spec.rows, IGNORED_ROW), blocks(y, spec.columns, IGNORED_COLUMN)
    across, down = columns.z.shape[:2]

    def of_rows(passed, row):
        def of_block(j, carry):
            here, passed = carry
            here_too, there = block.forward(spec, scale, row, at(columns, j))
            return block.merge(here, here_too), put(passed, j, block.merge(at(passed, j), there))

        start = block.empty(spec, len(row.z), dtype, row=True)
        here, passed = jax.lax.fori_loop(0, across, of_block, (start, passed))
        return passed, here

    start = jax.tree.map(lambda a: a.reshape(across, down), block.empty(spec, across * down, dtype, row=False))
    passed, here = jax.lax.scan(of_rows, start, rows)
    flat = lambda tree, size: jax.tree.map(lambda a: a.reshape(-1)[:size], tree)
    return flat(here, n), flat(passed, m)


def backward(spec: Spec, scale: jax.Array, x: Side, y: Side) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns d y [N, D], d^T x [M, D] and, for the sigmoid, the sum of d over columns [N]; see `block`."""
    n, m, width = len(x.z), len(y.z), x.z.shape[1]
    dtype = block.accumulator(x.z)
    rows, columns = blocks(x, spec.rows, IGNORED_ROW), blocks(y, spec.columns, IGNORED_COLUMN)
    across, down = columns.z.shape[:2]

    def of_rows(to_columns, row):
        def of_block(j, carry):
            to_row, to_columns = carry
            to_row_too, there, sums = block.backward(spec, scale, row, at(columns, j))
            to_row = jax.tree.map(jnp.add, to_row, (to_row_too, sums))
            return to_row, put(to_columns, j, at(to_columns, j) + there)

        sums = jnp.zeros(len(row.z), dtype) if spec.penalty == "sigmoid" else None
        start = jnp.zeros(row.z.shape, dtype), sums
        to_row, to_columns = jax.lax.fori_loop(0, across, of_block, (start, to_columns))
        return to_columns, to_row

    to_columns, (to_rows, sums) = jax.lax.scan(of_rows, jnp.zeros((across, down, width), dtype), rows)
    sums = None if sums is None else sums.reshape(-1)[:n]
    return to_rows.reshape(-1, width)[:n], to_columns.reshape(-1, width)[:m], sums


def blocks(side: Side, size: int, label: int) -> Side:
    """Returns arrays [n, ...] as [blocks, block, ...], in equal blocks of at most `size`; padding has this label."""
    n = len(side.z)
    count = -(-n // size)
    size = -(-n // count)
    return jax.tree.map(lambda a: a.reshape(count, size, *a.shape[1:]), pad(side, count * size, label))


def pad(side: Side, size: int, label: int) -> Side:
    """Pads a side to `size` rows; the added rows do not count."""
    extra = size - len(side.z)
    if not extra:
        return side
    add = jnp.zeros(len(side.z), block.accumulator(side.z)) if side.add is None else side.add
    fill = Side(z=0, add=LOWEST, labels=label, max=0, weight=0, positive=0)
    grow = lambda a, value: jnp.pad(a, ((0, extra), *((0, 0),) * (a.ndim - 1)), constant_values=value)
    return Side(*(None if a is None else grow(a, v) for a, v in zip(side._replace(add=add), fill, strict=True)))


def at(tree, j):
    """Returns row j of every array."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, j, keepdims=False), tree)


def put(tree, j, values):
    """Returns the arrays with `values` as row j."""
    return jax.tree.map(lambda a, v: jax.lax.dynamic_update_index_in_dim(a, v, j, 0), tree, values)
