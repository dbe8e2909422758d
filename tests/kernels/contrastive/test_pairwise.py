"""Every implementation, on one device and around a ring, equals the formulas in fp64; mistakes are named."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.support.contrastive_suite import (
    LOSS_NAMES,
    NAMES,
    assert_close,
    case,
    exact_sigmoid,
    exact_softmax,
    ring_of,
    sigmoid,
    sigmoid_case,
    softmax,
    softmax_case,
)
from vlm_jax.errors import UserError
from vlm_jax.kernels import contrastive
from vlm_jax.kernels.contrastive import block, ring

WAYS = [("reference", 1), ("blockwise", 1), (None, 2), (None, 8)]
of_ways = lambda ways: pytest.mark.parametrize("way", ways, ids=lambda way: f"{way[0] or 'ring'}-{way[1]}")
every_way, ways = of_ways(WAYS), of_ways(WAYS[:2] + WAYS[3:])
options = lambda way: dict(implementation=way[0], mesh=ring_of(way[1]) if way[1] > 1 else None)


shapes = pytest.mark.parametrize("n, m", [(1, 1), (7, 7), (8, 8), (64, 64), (1000, 1000), (37, 100)])


@every_way
@shapes
def test_logsumexp(n, m, way):
    for scale, aligned in ((1, False), (10, True), (200, True)):
        inputs, want = softmax_case(n, m, scale, aligned=aligned)
        assert_close(softmax(*inputs, **options(way)), want)


@every_way
@shapes
def test_sigmoid(n, m, way):
    limit = 1e-5 if way[0] == "reference" else 1e-6  # its dscale is a sum over pairs that cancel
    for scale in (1, 200):
        arrays, want = sigmoid_case(n, m, scale, aligned=True)
        assert_close(sigmoid(arrays, **options(way)), want, limit, LOSS_NAMES)


@ways
def test_sigmoid_of_labels(way):
    inputs, _ = case(37, 100, 200, aligned=True)
    labels = dict(x_labels=np.arange(37) % 5, y_labels=np.arange(100) % 7)
    want = exact_sigmoid(inputs, labels["x_labels"][:, None] == labels["y_labels"])
    limit = 2e-6 if way[0] == "reference" else 1e-6  # its dbias is a sum of positives against negatives
    assert_close(sigmoid(inputs, labels, **options(way)), want, limit, LOSS_NAMES)


@of_ways(WAYS[1::2])
@pytest.mark.parametrize("n, m, rows, columns", [(1024, 1024, 256, 128), (1000, 600, 130, 70)])
def test_many_blocks_of_rows_and_of_columns(n, m, rows, columns, way, monkeypatch):
    """The last blocks are filled up in the second case, on one device and in a device's share."""
    monkeypatch.setattr(contrastive, "Spec", functools.partial(block.Spec, rows=rows, columns=columns))
    inputs, want = softmax_case(n, m, 100, aligned=True)
    assert_close(jax.jit(functools.partial(softmax.__wrapped__, **options(way)))(*inputs), want)
    arrays, want = sigmoid_case(n, m, 100, aligned=True)
    assert_close(jax.jit(functools.partial(sigmoid.__wrapped__, **options(way)))(arrays), want, names=LOSS_NAMES)


@ways
def test_algorithm_is_exact_in_fp64(way):
    with jax.enable_x64(True):
        for scale in (1, 200):
            inputs, want = softmax_case(61, 40, scale, np.float64)
            assert_close(softmax(*inputs, **options(way)), want, 1e-13)
            arrays, want = sigmoid_case(61, 40, scale, np.float64)
            assert_close(sigmoid(arrays, **options(way)), want, 1e-13, LOSS_NAMES)


@of_ways(WAYS[1::2])
@pytest.mark.parametrize("n, width", [(64, 64), (64, 512), (1000, 128), (4096, 512)])
def test_large_scale_without_a_winner(n, width, way):
    """Embeddings at random: x . y is rounded to 1e-8 or so, and a gradient follows the logit's, 200 times that.

    Optimized as for users: the tests' unoptimized programs round more often, without fused multiply-adds.
    """
    inputs, want = softmax_case(n, n, 200, width=width)
    run = functools.partial(softmax.__wrapped__, **options(way))
    assert_close(jax.jit(run, compiler_options={"xla_backend_optimization_level": 3})(*inputs), want)


@ways
def test_ignored_rows_take_part_in_nothing(way):
    """Even if they hold NaN; what is left equals the pass without them."""
    (x, y, *rest), (g, h) = case(40, 50, 10)
    rows, columns = np.arange(40) % 3 > 0, np.arange(50) < 41
    small = softmax((x[rows], y[columns], *rest), (g[rows], h[columns]), implementation="reference")
    labels = dict(x_labels=np.arange(40)[rows], y_labels=np.arange(50)[columns])
    small_sigmoid = sigmoid((x[rows], y[columns], *rest), labels, implementation="reference")
    x, y = np.where(rows[:, None], x, np.nan), np.where(columns[:, None], y, np.nan)
    masks = dict(x_mask=rows, y_mask=columns)
    row, column, dx, dy, *others = softmax((x, y, *rest), (g, h), masks, **options(way))
    assert_close((row[rows], column[columns], dx[rows], dy[columns], *others), small)
    for left, mask in ((row, rows), (column, columns), (dx, rows), (dy, columns)):
        np.testing.assert_array_equal(np.asarray(left)[~mask], 0)
    value, dx, dy, *others = sigmoid((x, y, *rest), masks, **options(way))
    assert_close((value, dx[rows], dy[columns], *others), small_sigmoid, names=LOSS_NAMES)


@ways
def test_nothing_to_sum_is_minus_infinity_without_gradient(way):
    inputs, cotangents = case(6, 8, 10)
    row, column, *grads = softmax(inputs, cotangents, dict(y_mask=np.zeros(8, bool)), **options(way))
    assert np.all(row == -np.inf) and np.all(column == 0)
    assert not any(np.any(grad) for grad in grads)


@ways
def test_positives_and_best(way):
    (x, y, scale, bias), _ = case(30, 44, 10)
    labels = np.arange(30) % 4, np.arange(44) % 5
    logits = np.asarray(scale * x @ y.T + bias, np.float64)
    match = labels[0][:, None] == labels[1]

    def run(x, y, scale, bias):
        given = dict(x_labels=labels[0], y_labels=labels[1], positives=True, best=True)
        return contrastive.statistics(x, y, scale, bias, **given, **options(way))

    def total(*arrays):
        results = run(*arrays)
        return sum(result.positive_sum.sum() for result in results), results

    grads, results = jax.jit(jax.grad(total, (0, 1, 2, 3), has_aux=True))(x, y, scale, bias)
    for axis, result in zip((1, 0), results, strict=True):
        np.testing.assert_allclose(result.positive_sum, (logits * match).sum(axis), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(result.positive_count, match.sum(axis))
        best = lambda where, axis=axis: np.max(logits, axis, initial=-1e30, where=where)
        np.testing.assert_allclose(result.best_positive, best(match), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(result.best_negative, best(~match), rtol=1e-5, atol=1e-6)
    d = 2.0 * match
    want = scale * d @ y, scale * d.T @ x, (d * (x @ y.T)).sum(), d.sum()
    assert_close(grads, want, names=NAMES[2:])


@ways
def test_bfloat16(way):
    """Products of bf16, sums in fp32: values as exact as in fp32; gradients are bf16."""
    (x, y, *rest), cotangents = case(100, 60, 20, aligned=True)
    x, y = (jnp.asarray(z, jnp.bfloat16) for z in (x, y))
    got, want = softmax((x, y, *rest), cotangents, **options(way)), exact_softmax((x, y, *rest), cotangents)
    assert got[0].dtype == jnp.float32 and got[2].dtype == jnp.bfloat16
    assert_close(got[:2], want[:2], names=NAMES[:2])
    assert_close(got[2:], want[2:], 4e-3, names=NAMES[2:])


def test_a_ring_holds_no_more_than_a_block_and_its_share():
    """8 devices, 16,384 x 16,384 pairs: all logits would be 134 MB a device."""
    mesh = ring_of(8)
    arrays = [jax.ShapeDtypeStruct((16384, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))] * 2
    loss = lambda x, y: sum(lse.mean() for lse in contrastive.pairwise_logsumexp(x, y, 10.0, mesh=mesh))
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*arrays).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 40e6
    assert "all-gather" not in compiled.as_text()


@pytest.mark.parametrize("rows, columns", [(1, 2), (2, 1), (2, 2), (4, 4), (3, 4), (16, 16)])
def test_the_ring_goes_from_neighbour_to_neighbour(rows, columns):
    walk = ring.closed_walk(rows, columns)
    assert sorted(walk) == [(a, b) for a in range(rows) for b in range(columns)]
    for (a, b), (c, d) in zip(walk, walk[1:] + walk[:1], strict=True):
        assert abs(a - c) + abs(b - d) == 1


@pytest.mark.parametrize("rows, columns", [(3, 3), (1, 4)])
def test_a_grid_without_a_closed_walk(rows, columns):
    assert ring.closed_walk(rows, columns) is None


def test_the_mesh_may_come_from_set_mesh():
    inputs = case(16, 16, 10)
    with jax.set_mesh(ring_of(8)):
        program = jax.jit(lambda arrays: contrastive.pairwise_logsumexp(*arrays)).lower(inputs[0])
    assert "collective_permute" in program.as_text()
    assert_close(program.compile()(inputs[0]), exact_softmax(*inputs)[:2], names=NAMES[:2])


def struct(n, width=4, dtype=jnp.float32):
    return jax.ShapeDtypeStruct((n, width), dtype)


def test_explain():
    small, large = struct(8), struct(4096)
    assert contrastive.explain(small, small).implementation == "reference"
    assert contrastive.explain(large, large).implementation == "blockwise"
    assert contrastive.explain(small, small, implementation="blockwise") == ("blockwise", "asked for by name")
    choice = contrastive.explain(small, small, mesh=ring_of(8))
    assert choice.implementation == "blockwise" and "8 devices pass columns around a ring over data" in choice.reason


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(implementation="magic"), "`magic`; expected one of: reference, blockwise"),
        (dict(y=jnp.zeros((3, 5))), r"x \[N, D\] and y \[M, D\]; got x \(3, 4\) float32, y \(3, 5\)"),
        (dict(y=jnp.zeros((3, 4), jnp.bfloat16)), "equal floating dtypes"),
        (dict(scale=jnp.ones(3)), r"scale is a scalar; got shape \(3,\)"),
        (dict(x_mask=jnp.ones(2, bool)), r"x_mask is bool_? \(3,\)"),
        (dict(x_mask=jnp.ones(3)), "got float32"),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = dict(x=jnp.zeros((3, 4)), y=jnp.zeros((3, 4)), scale=1.0) | change
    with pytest.raises(UserError, match=message):
        contrastive.pairwise_logsumexp(**arguments)


def test_a_mesh_without_the_axes_is_named():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    x = jnp.zeros((4, 4))
    with pytest.raises(UserError, match="the mesh has the axes model, none of data, fsdp; give axes="):
        contrastive.pairwise_logsumexp(x, x, 1.0, mesh=mesh)
    with pytest.raises(UserError, match="has no axis `batch`"):
        contrastive.pairwise_logsumexp(x, x, 1.0, mesh=mesh, axes="batch")
    with pytest.raises(UserError, match="labels are given for x and y"):
        contrastive.pairwise_sigmoid_loss(x, x, 1.0, x_labels=jnp.arange(4))
    with pytest.raises(UserError, match="penalty is `hinge`"):
        contrastive.statistics(x, x, 1.0, penalty="hinge")
