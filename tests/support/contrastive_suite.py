"""What every Pallas kernel of `kernels.contrastive` must pass: `class TestX(KernelSuite): implementation = "x"`.

Truth is in fp64 (numpy) or the plain form; `tests/kernels/contrastive` has the other implementations.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from vlm_jax.kernels import contrastive

NAMES = ("row", "column", "dx", "dy", "dscale", "dbias")
LOSS_NAMES = ("loss", *NAMES[2:])


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def case(n, m, scale, dtype=np.float32, width=16, aligned=False):
    """(x, y, scale, bias), cotangents of rows and columns."""
    rng = np.random.default_rng(n + m)
    x, y = rng.normal(size=(n, width)), rng.normal(size=(m, width))
    if aligned:
        y[: min(n, m)] = x[: min(n, m)] + 0.3 * y[: min(n, m)]
    arrays = unit(x).astype(dtype), unit(y).astype(dtype), dtype(scale), dtype(-2)
    return arrays, (rng.uniform(0.5, 1, n).astype(dtype), rng.uniform(0.5, 1, m).astype(dtype))


def exact_softmax(arrays, cotangents):
    x, y, scale, bias = (np.asarray(a, np.float64) for a in arrays)
    g, h = (np.asarray(a, np.float64) for a in cotangents)
    similarity = x @ y.T
    logits = scale * similarity + bias
    row, column = logsumexp(logits, 1), logsumexp(logits, 0)
    d = g[:, None] * np.exp(logits - row.value[:, None]) + h * np.exp(logits - column.value)
    return row, column, scale * d @ y, scale * d.T @ x, (d * similarity).sum(), d.sum()


class Sum(NamedTuple):
    """A value of two terms, and the sum of the terms' sizes, which its rounding errors follow."""

    value: np.ndarray
    size: np.ndarray


def logsumexp(logits, axis):
    """max + log(sum(exp(logits - max))): near 0 where the two cancel, as -2 and log(7) do."""
    top = logits.max(axis)
    rest = np.log(np.exp(logits - np.expand_dims(top, axis)).sum(axis))
    return Sum(top + rest, np.abs(top) + rest)


def exact_sigmoid(arrays, match):
    x, y, scale, bias = (np.asarray(a, np.float64) for a in arrays)
    sign = np.where(match, 1, -1)
    similarity = x @ y.T
    logits = sign * (scale * similarity + bias)
    d = -sign / (1 + np.exp(logits)) / len(x)
    return np.logaddexp(0, -logits).sum() / len(x), scale * d @ y, scale * d.T @ x, (d * similarity).sum(), d.sum()


@functools.cache
def softmax_case(*which, **more):
    """Arguments as of `case`; (arrays, cotangents), and what is exact."""
    inputs = case(*which, **more)
    return inputs, exact_softmax(*inputs)


@functools.cache
def sigmoid_case(n, m, *which, **more):
    arrays, _ = case(n, m, *which, **more)
    return arrays, exact_sigmoid(arrays, np.eye(n, m))


def assert_close(got, want, limit=1e-6, names=NAMES):
    """The error's norm against the norm of the value, of a `Sum` against that of its terms."""
    for name, a, b in zip(names, got, want, strict=True):
        b, size = b if isinstance(b, Sum) else (b, b)
        error = np.linalg.norm(np.asarray(a, np.float64) - b) / max(np.linalg.norm(size), 1e-30)
        assert error <= limit, f"{name}: relative error {error:.1e}, allowed {limit:.0e}"  # a NaN fails, too


@functools.cache
def ring_of(devices):
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


@functools.partial(jax.jit, static_argnames=("implementation", "mesh"))
def softmax(arrays, cotangents, masks=None, implementation=None, mesh=None):
    """(row, column, dx, dy, dscale, dbias) of `pairwise_logsumexp`"""
    run = functools.partial(contrastive.pairwise_logsumexp, **masks or {}, implementation=implementation, mesh=mesh)
    out, pull = jax.vjp(run, *arrays)
    return *out, *pull(cotangents)


@functools.partial(jax.jit, static_argnames=("implementation", "mesh"))
def sigmoid(arrays, given=None, implementation=None, mesh=None):
    """(loss, dx, dy, dscale, dbias) of `pairwise_sigmoid_loss` with these labels and masks"""
    run = functools.partial(contrastive.pairwise_sigmoid_loss, **given or {}, implementation=implementation, mesh=mesh)
    value, grads = jax.value_and_grad(run, (0, 1, 2, 3))(*arrays)
    return value, *grads


class KernelSuite:
    implementation: str

    @pytest.mark.parametrize("n, m", [(1, 1), (37, 200), (300, 700)])
    @pytest.mark.parametrize("scale", [1, 200])
    def test_logsumexp(self, n, m, scale):
        inputs = case(n, m, scale, width=32, aligned=True)
        assert_close(softmax(*inputs, implementation=self.implementation), exact_softmax(*inputs))

    @pytest.mark.parametrize("n, m", [(1, 1), (37, 200), (300, 700)])
    def test_sigmoid_of_labels(self, n, m):
        inputs, _ = case(n, m, 10, width=32, aligned=True)
        labels = dict(x_labels=np.arange(n) % 5, y_labels=np.arange(m) % 7)
        want = exact_sigmoid(inputs, labels["x_labels"][:, None] == labels["y_labels"])
        assert_close(sigmoid(inputs, labels, implementation=self.implementation), want, 2e-6, LOSS_NAMES)

    def test_masks_positives_and_best(self):
        """Several positives a row; ignored embeddings are NaN."""
        (x, y, scale, bias), (g, h) = case(37, 200, 10, width=100)
        masks = dict(x_mask=np.arange(37) % 3 > 0, y_mask=np.arange(200) < 150)
        x, y = (np.where(mask[:, None], z, np.nan) for z, mask in zip((x, y), masks.values(), strict=True))
        given = masks | dict(x_labels=np.arange(37) % 4, y_labels=np.arange(200) % 5, positives=True, best=True)

        def run(implementation):
            def total(*arrays):
                results = contrastive.statistics(*arrays, **given, implementation=implementation)
                weighted = [w @ r.lse + w**2 @ r.positive_sum for w, r in zip((g, h), results, strict=True)]
                return sum(weighted), results

            return jax.jit(jax.grad(total, (0, 1, 2, 3), has_aux=True))(x, y, scale, bias)

        got, want = run(self.implementation), run("reference")
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got[1], want[1])
        assert_close(got[0], want[0], 2e-6, NAMES[2:])

    def test_nothing_to_sum_is_minus_infinity_without_gradient(self):
        nothing = dict(y_mask=np.zeros(8, bool))
        row, column, *grads = softmax(*case(6, 8, 10), nothing, implementation=self.implementation)
        assert np.all(row == -np.inf) and np.all(column == 0)
        assert not any(np.any(grad) for grad in grads)

    def test_bfloat16(self):
        (x, y, *rest), cotangents = case(300, 600, 20, aligned=True)
        inputs = (jnp.asarray(x, jnp.bfloat16), jnp.asarray(y, jnp.bfloat16), *rest), cotangents
        got, want = softmax(*inputs, implementation=self.implementation), exact_softmax(*inputs)
        assert got[0].dtype == jnp.float32 and got[2].dtype == jnp.bfloat16
        assert_close(got[:2], want[:2], names=NAMES[:2])
        assert_close(got[2:], want[2:], 4e-3, names=NAMES[2:])

    def test_around_a_ring(self):
        inputs, options = case(40, 60, 10), dict(implementation=self.implementation, mesh=ring_of(2))
        assert_close(softmax(*inputs, **options), exact_softmax(*inputs))
        assert_close(sigmoid(inputs[0], **options), exact_sigmoid(inputs[0], np.eye(40, 60)), names=LOSS_NAMES)
