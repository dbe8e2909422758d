"""What a block of pairs adds to its rows and its columns, and what it takes back: the arithmetic, in XLA.

With x [N, D] in rows, y [M, D] in columns, s_i = the numbers of a row, t_j = those of a column,

    l_ij = scale x_i . y_j + bias

- softmax: the log-sum-exps of rows and columns, kept as (max, sum of exp(l - max)) and merged as in Milakov and
  Gimelshein 2018 (arXiv:1805.02867, Algorithm 3); the cotangent of the logits is
  d_ij = g_i exp(l_ij - m_i) / s_i + h_j exp(l_ij - m_j) / t_j + (p_i + q_j) [i and j positive],
  with g, h those of the log-sum-exps and p, q those of the sums of positives' logits. The pair (m, s) and not its
  logarithm stands in the exponent: rounding log-sum-exp costs digits at large scales.
- sigmoid: rows sum softplus(-z_ij l_ij), z = +1 for positives, else -1 (arXiv:2303.15343, section 3.2);
  d_ij = -g_i z_ij sigmoid(-z_ij l_ij).

Either way dx = scale d y, dy = scale d^T x, and d/dscale = sum_ij d_ij x_i . y_j = sum_i x_i . (d y)_i, which needs no
further pass over the pairs.

Everything but the products' bf16 operands is in `promote(dtype, float32)`. In bf16, d is rounded to bf16 for the matrix
unit, and sums stay in fp32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

LOWEST = -1e30
"""Logit of a pair that does not count; finite, so that differences of two of them are numbers."""

IGNORED_ROW, IGNORED_COLUMN = -(2**31), -(2**31) + 1
"""Labels of those that count nowhere: they match nothing."""


class Spec(NamedTuple):
    """What a pass over the pairs computes.

    Attributes:
      penalty: "softmax" (log-sum-exps of rows and columns) or "sigmoid" (loss of rows).
      positives: softmax: also the sums of positives' logits, and their number, for rows and columns.
      best: also the largest logit of positives and that of negatives, for rows and columns.
      rows, columns: of a block.
      by: who passes over the pairs of one device, a key of `IMPLEMENTATIONS`.
    """

    penalty: str = "softmax"
    positives: bool = False
    best: bool = False
    rows: int = 1024
    columns: int = 2048
    by: str = "blockwise"


class Side(NamedTuple):
    """The rows or the columns: embeddings and what is known of each; n of them.

    Attributes:
      z: [n, D].
      add: added to the logits, [n]: the bias (in rows), `LOWEST` where ignored; or None for nothing.
      labels: int32 [n]; a row and a column are positives of each other where these are equal; or None.
      max, weight, positive: for the backward pass, [n]: m, g / s and p of the module's equations; None elsewhere.
    """

    z: jax.Array
    add: jax.Array | None = None
    labels: jax.Array | None = None
    max: jax.Array | None = None
    weight: jax.Array | None = None
    positive: jax.Array | None = None


class Stats(NamedTuple):
    """Partial results of rows or of columns, [n] each; None where the `Spec` does not want them."""

    max: jax.Array | None = None
    sum: jax.Array | None = None
    loss: jax.Array | None = None
    positive_sum: jax.Array | None = None
    positive_count: jax.Array | None = None
    best_positive: jax.Array | None = None
    best_negative: jax.Array | None = None


class Results(NamedTuple):
    """What is known of rows or of columns once all pairs have passed, [n] each; None where the `Spec` wants it not.

    Attributes:
      lse: log-sum-exp of the logits; -inf over nothing; 0 for an ignored row or column.
      loss: sigmoid: sum of softplus(-z l), of rows only.
      positive_sum, positive_count: sum of positives' logits, and how many there are. The count has no gradient.
      best_positive, best_negative: largest logits, `LOWEST` where there is none. Without gradient.
    """

    lse: jax.Array | None = None
    loss: jax.Array | None = None
    positive_sum: jax.Array | None = None
    positive_count: jax.Array | None = None
    best_positive: jax.Array | None = None
    best_negative: jax.Array | None = None


def empty(spec: Spec, size: int, dtype, *, row: bool) -> Stats:
    """The stats of no pairs."""
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
    """The stats of both sets of pairs."""
    both = lambda op, x, y: None if x is None else op(x, y)
    top, total = both(jnp.maximum, a.max, b.max), None
    if top is not None:
        total = a.sum * jnp.exp(a.max - top) + b.sum * jnp.exp(b.max - top)
    add, best = (lambda x, y: both(jnp.add, x, y)), (lambda x, y: both(jnp.maximum, x, y))
    return Stats(top, total, *map(add, a[2:5], b[2:5]), *map(best, a[5:], b[5:]))


def accumulator(x: jax.Array):
    """The dtype of logits and sums."""
    return jnp.promote_types(x.dtype, jnp.float32)


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Products summed over axis contract[0] of a and contract[1] of b, in b's `accumulator`."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    precision = jax.lax.Precision.HIGHEST
    return jax.lax.dot_general(a.astype(b.dtype), b, dims, precision, preferred_element_type=accumulator(b))


def _logits(scale, x: Side, y: Side):
    logits = scale * _similarity(x.z, y.z)
    if x.add is not None:
        logits += x.add[:, None]
    return logits if y.add is None else logits + y.add


def _similarity(x, y, halvings=3):
    """x y^T; in fp32 by pairwise summation over D, since a logit's rounding is `scale` times the product's."""
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
    """Returns d y [rows, D], d^T x [columns, D] and, for the sigmoid, d's sum over columns [rows], of one block."""
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
