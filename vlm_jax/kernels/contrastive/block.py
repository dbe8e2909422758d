"""The arithmetic of one block of pairs, forward and backward, in XLA.

    l_ij = scale x_i . y_j + bias

x [N, D] are the rows, y [M, D] the columns. Row i has the maximum m_i and the sum s_i of exp(l_ij - m_i), column j
the maximum m_j and the sum t_j of exp(l_ij - m_j).

- softmax: the log-sum-exps of rows and columns, kept as (max, sum of exp(l - max)) and merged as in Milakov and
  Gimelshein 2018 (arXiv:1805.02867, Algorithm 3); the cotangent of the logits is
  d_ij = g_i exp(l_ij - m_i) / s_i + h_j exp(l_ij - m_j) / t_j + (p_i + q_j) [i and j positive],
  where g, h are the cotangents of the log-sum-exps and p, q those of the sums of positives' logits. The exponent uses
  the pair (m, s) instead of the log-sum-exp, because rounding log-sum-exp costs digits at large scales.
- sigmoid: rows sum softplus(-z_ij l_ij), z = +1 for positives, else -1 (arXiv:2303.15343, section 3.2);
  d_ij = -g_i z_ij sigmoid(-z_ij l_ij).

In both cases dx = scale d y, dy = scale d^T x, and d/dscale = sum_ij d_ij x_i . y_j = sum_i x_i . (d y)_i, without
another pass over the pairs.

All arithmetic is in `promote(dtype, float32)`, except the bf16 operands of products. In bf16, d is rounded to bf16 for
the matrix unit; sums stay in fp32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

LOWEST = -1e30
"""Logit of a pair that does not count; finite, so that the difference of two such logits is a number."""

IGNORED_ROW, IGNORED_COLUMN = -(2**31), -(2**31) + 1
"""Labels of rows and columns that do not count: these labels match nothing."""


class Spec(NamedTuple):
    """The requested results of a pass over the pairs, and its block sizes.

    Attributes:
      penalty: "softmax" (log-sum-exps of rows and columns) or "sigmoid" (loss of rows).
      positives: softmax: also the sums of positives' logits, and the number of positives, for rows and columns.
      best: also the largest logit of positives and the largest logit of negatives, for rows and columns.
      rows, columns: size of a block.
      by: the implementation for one device's pairs, a key of `IMPLEMENTATIONS`.
    """

    penalty: str = "softmax"
    positives: bool = False
    best: bool = False
    rows: int = 1024
    columns: int = 2048
    by: str = "blockwise"


class Side(NamedTuple):
    """The rows or the columns: n embeddings with their vectors.

    Attributes:
      z: embeddings [n, D].
      add: added to the logits, [n]: the bias (in rows), `LOWEST` for ignored ones; or None.
      labels: int32 [n]; a row and a column with equal labels are positives; or None.
      max, weight, positive: for the backward pass, [n]: m, g / s and p of the module's equations; else None.
    """

    z: jax.Array
    add: jax.Array | None = None
    labels: jax.Array | None = None
    max: jax.Array | None = None
    weight: jax.Array | None = None
    positive: jax.Array | None = None


class Stats(NamedTuple):
    """Partial results of rows or of columns, [n] each; None if the `Spec` does not request them."""

    max: jax.Array | None = None
    sum: jax.Array | None = None
    loss: jax.Array | None = None
    positive_sum: jax.Array | None = None
    positive_count: jax.Array | None = None
    best_positive: jax.Array | None = None
    best_negative: jax.Array | None = None


class Results(NamedTuple):
    """Final results of rows or of columns, [n] each; None if the `Spec` does not request them.

    Attributes:
      lse: log-sum-exp of the logits; -inf over no pairs; 0 for an ignored row or column.
      loss: sigmoid: sum of softplus(-z l), for rows only.
      positive_sum, positive_count: sum of positives' logits, and number of positives. The count has no gradient.
      best_positive, best_negative: largest logits, `LOWEST` over no pairs. Without gradient.
    """

    lse: jax.Array | None = None
    loss: jax.Array | None = None
    positive_sum: jax.Array | None = None
    positive_count: jax.Array | None = None
    best_positive: jax.Array | None = None
    best_negative: jax.Array | None = None


def empty(spec: Spec, size: int, dtype, *, row: bool) -> Stats:
    """Returns the stats of no pairs."""
    zeros, lowest = (lambda on: jnp.zeros(size, dtype) if on else None), jnp.full(size, LOWEST, dtype)
    soft = spec.penalty == "softmax"
    return Stats(
        lowest if soft else None,
        zeros(soft),
        zeros(row and not soft),
        zeros(spec.positives),
        zeros(spec.positives),
        lowest if spec.best else None,
        lowest if spec.best else None,
    )


def merge(a: Stats, b: Stats) -> Stats:
    """Returns the stats of the union of two sets of pairs."""
    both = lambda op, x, y: None if x is None else op(x, y)
    top, total = both(jnp.maximum, a.max, b.max), None
    if top is not None:
        total = a.sum * jnp.exp(a.max - top) + b.sum * jnp.exp(b.max - top)
    add, best = (lambda x, y: both(jnp.add, x, y)), (lambda x, y: both(jnp.maximum, x, y))
    return Stats(top, total, *map(add, a[2:5], b[2:5]), *map(best, a[5:], b[5:]))


def accumulator(x: jax.Array):
    """Returns the dtype of logits and sums."""
    return jnp.promote_types(x.dtype, jnp.float32)


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Contracts axis contract[0] of a with axis contract[1] of b, in b's `accumulator`."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    precision = jax.lax.Precision.HIGHEST
    return jax.lax.dot_general(a.astype(b.dtype), b, dims, precision, preferred_element_type=accumulator(b))


def _logits(scale, x: Side, y: Side):
    logits = scale * _similarity(x.z, y.z)
    if x.add is not None:
        logits += x.add[:, None]
    return logits if y.add is None else logits + y.add


def _similarity(x, y, halvings=3):
    """Returns x y^T; fp32 sums pairwise over D, because `scale` multiplies the product's rounding error."""
    half = x.shape[1] // 2
    if x.dtype != jnp.float32 or half < 32 or not halvings:
        return dot(x, y, (1, 1))
    left, right = (_similarity(x[:, part], y[:, part], halvings - 1) for part in (slice(half), slice(half, None)))
    return left + right


def forward(spec: Spec, scale: jax.Array, x: Side, y: Side) -> tuple[Stats, Stats]:
    """Returns the stats of rows and columns of one block."""
    logits = _logits(scale, x, y)
    match = None if x.labels is None else x.labels[:, None] == y.labels
    rows, columns = {}, {}
    sides = ((1, rows), (0, columns))
    if spec.best:
        for axis, out in sides:
            out["best_positive"] = jnp.max(jnp.where(match, logits, LOWEST), axis)
            out["best_negative"] = jnp.max(jnp.where(match, LOWEST, logits), axis)
    if spec.positives:
        for axis, out in sides:
            out["positive_sum"] = jnp.sum(jnp.where(match, logits, 0), axis)
            out["positive_count"] = jnp.sum(match, axis, dtype=logits.dtype)
    if spec.penalty == "sigmoid":
        loss = jax.nn.softplus(jnp.where(match, -logits, logits))
        rows["loss"] = jnp.sum(loss, 1)
        return Stats(**rows), Stats(**columns)
    for axis, out in sides:
        out["max"] = jnp.maximum(out["best_positive"], out["best_negative"]) if spec.best else jnp.max(logits, axis)
        out["sum"] = jnp.sum(jnp.exp(logits - jnp.expand_dims(out["max"], axis)), axis)
    return Stats(**rows), Stats(**columns)


def backward(spec: Spec, scale: jax.Array, x: Side, y: Side) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns d y [rows, D], d^T x [columns, D] and, for the sigmoid, d's sum over columns [rows], for one block."""
    logits = _logits(scale, x, y)
    match = None if x.labels is None else x.labels[:, None] == y.labels
    of_rows = None
    if spec.penalty == "sigmoid":
        d = jnp.where(match, -x.weight[:, None], x.weight[:, None]) * jax.nn.sigmoid(jnp.where(match, -logits, logits))
        of_rows = jnp.sum(d, 1)
    else:
        d = x.weight[:, None] * jnp.exp(logits - x.max[:, None]) + y.weight * jnp.exp(logits - y.max)
        if spec.positives:
            d += jnp.where(match, x.positive[:, None] + y.positive, 0)
    return dot(d, y.z, (1, 0)), dot(d, x.z, (0, 0)), of_rows
