"""What every implementation of `kernels.attention` must pass: `class TestX(AttentionSuite): implementation = "x"`.

Truth is the equation and its derivative in fp64 (numpy). fp32 results may differ by 2e-6 of the largest value (of 1
where all are smaller), bf16 results by 1.5 times what the plain reference's own rounding costs (root mean square).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from vlm_jax import kernels
from vlm_jax.kernels.attention.reference import HIDDEN

CASES = {
    "plain": dict(lq=5, lk=7),
    "causal": dict(lq=6, lk=6, causal=True),
    "causal_more_keys": dict(lq=3, lk=6, causal=True),
    "causal_more_queries": dict(lq=6, lk=3, causal=True),
    "key_mask": dict(lq=4, lk=9, mask=(2, 1, 1, 9), hidden=0),
    "key_mask_shared": dict(lq=4, lk=9, mask=(1, 1, 1, 9), causal=True),
    "full_mask": dict(lq=4, lk=9, mask=(2, 3, 4, 9), hidden=1),
    "query_mask": dict(lq=4, lk=9, mask=(2, 1, 4, 1), hidden=0),
    "bias": dict(lq=5, lk=7, bias=(1, 3, 5, 7)),
    "bias_of_example": dict(lq=5, lk=7, bias=(2, 1, 5, 7)),
    "bias_of_key": dict(lq=5, lk=7, bias=(1, 1, 1, 7)),
    "bias_and_mask": dict(lq=5, lk=7, bias=(2, 3, 5, 7), mask=(1, 1, 5, 7), causal=True, hidden=0),
    "scale": dict(lq=5, lk=7, scale=-0.7),
    "one_key": dict(lq=5, lk=1, bias=(1, 1, 5, 1)),
    "one_query": dict(lq=1, lk=9, bias=(1, 3, 1, 9), mask=(2, 1, 1, 9)),
    # a head_dim that does not divide 128, alone and in a group of heads that fills lane tiles
    "dim_72": dict(lq=9, lk=10, heads=2, head_dim=72),
    "dim_72_packed": dict(lq=9, lk=10, heads=16, head_dim=72),
    "dim_80": dict(lq=9, lk=10, heads=8, head_dim=80, mask=(2, 1, 1, 10)),
    "dim_88": dict(lq=9, lk=10, heads=16, head_dim=88),
    "dim_104": dict(lq=9, lk=10, heads=16, head_dim=104, causal=True),
    "dim_128": dict(lq=9, lk=10, head_dim=128),
    "dim_256": dict(lq=9, lk=10, heads=2, head_dim=256),
    "heads_12": dict(lq=9, lk=10, heads=12, head_dim=64, bias=(1, 12, 9, 10)),
    "length_50": dict(lq=50, lk=50, heads=4, head_dim=32),
    "length_77": dict(lq=77, lk=77, heads=2, head_dim=64, causal=True, mask=(2, 1, 1, 77)),
    "length_64_196": dict(lq=64, lk=196, heads=2, head_dim=64),
    "length_197": dict(lq=197, lk=197, heads=1, head_dim=64),
    "length_257": dict(lq=257, lk=257, batch=1, heads=2, head_dim=64),
    "length_577": dict(lq=577, lk=577, batch=1, heads=1, head_dim=8, causal=True),
    "length_729": dict(lq=729, lk=729, batch=1, heads=1, head_dim=72),
    "length_1024": dict(lq=1024, lk=1024, batch=1, heads=1, head_dim=8),
    "length_1030": dict(lq=1030, lk=1100, heads=3, head_dim=64, mask=(2, 1, 1, 1100), hidden=1),
    "length_1100": dict(lq=1100, lk=1025, batch=1, heads=1, head_dim=72, causal=True),
}


@functools.cache
def case(name, dtype="float32"):
    """(q, k, v, bias or None, cotangent), options, and the truth: [out, dq, dk, dv, dbias if any] in fp64."""
    return _case(dtype, **CASES[name])


def _case(dtype, lq, lk, batch=2, heads=3, head_dim=8, bias=None, mask=None, hidden=None, **options):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    q, k, v, dout = (draw(batch, length, heads, head_dim) for length in (lq, lk, lk, lq))
    bias = None if bias is None else jnp.asarray(rng.standard_normal(bias), jnp.float32)
    if mask is not None:
        mask = rng.random(mask) < 0.6
        mask[..., 0] = True
        if hidden is not None:  # queries of this example that see nothing
            mask[min(hidden, len(mask) - 1), :, :1] = False
    options = dict(mask=mask, **options)
    return (q, k, v, bias, dout), options, exact(q, k, v, bias, dout, **options)


def exact(q, k, v, bias, dout, mask=None, causal=False, scale=None):
    """The equation and its derivative, in fp64."""
    swap = lambda x: np.swapaxes(np.asarray(x, np.float64), 1, 2)  # [batch, length, heads, ...] and back
    q, k, v, dout = map(swap, (q, k, v, dout))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = scale * q @ k.mT
    seen = np.ones(logits.shape, bool)
    if bias is not None:
        logits = logits + np.asarray(bias, np.float64)
    if mask is not None:
        seen = seen & mask
    if causal:
        seen = seen & (np.arange(q.shape[2])[:, None] >= np.arange(k.shape[2]))
    logits = np.where(seen, logits, HIDDEN)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    dweights = dout @ v.mT
    dlogits = weights * (dweights - (weights * dweights).sum(-1, keepdims=True)) * seen
    results = list(map(swap, (weights @ v, scale * dlogits @ k, scale * dlogits.mT @ q, weights.mT @ dout)))
    if bias is not None:
        shared = tuple(i for i, n in enumerate(bias.shape) if n == 1)
        results.append(dlogits.sum(shared, keepdims=True) if shared else dlogits)
    return results


def outputs(attend, arrays):
    """[out, dq, dk, dv, dbias if any] of attend(q, k, v, bias)."""
    *arrays, dout = arrays
    there = [i for i, x in enumerate(arrays) if x is not None]

    def run(dout, *present):
        full = dict(zip(there, present, strict=True))
        return attend(*(full.get(i) for i in range(4)))

    out, pull = jax.vjp(functools.partial(run, None), *(arrays[i] for i in there))
    return [out, *pull(dout.astype(out.dtype))]


def assert_close(got, truth, limits=None):
    for name, a, b, limit in zip(["out", "dq", "dk", "dv", "dbias"], got, truth, limits or [None] * 5, strict=False):
        assert a.shape == b.shape, name
        error = np.max(np.abs(np.asarray(a, np.float64) - b))
        limit = 2e-6 * max(1.0, np.max(np.abs(b))) if limit is None else limit
        assert error <= limit, f"{name}: error {error:.2e}, allowed {limit:.2e}"  # a NaN fails, too


class AttentionSuite:
    """The tests; a subclass names the implementation."""

    implementation: str
    check_vma = True  # of `shard_map`; Pallas's interpreter does not track what varies over which mesh axes

    def attend(self, **options):
        return lambda q, k, v, bias: kernels.attention(
            q, k, v, bias=bias, **options, implementation=self.implementation
        )  # fmt: skip

    def outputs(self, arrays, options):
        return jax.jit(functools.partial(outputs, self.attend(**options)))(arrays)

    @pytest.mark.parametrize("name", CASES)
    def test_values_and_gradients(self, name):
        arrays, options, truth = case(name)
        assert_close(self.outputs(arrays, options), truth)

    @pytest.mark.parametrize("name", ["length_77", "length_1030", "dim_72_packed", "bias_and_mask"])
    def test_bf16(self, name):
        arrays, options, truth = case(name, "bfloat16")
        reference = rounded(name)
        got = self.outputs(arrays, options)
        assert [x.dtype for x in got[:4]] == [jnp.bfloat16] * 4
        rms = lambda a, b: np.sqrt(np.mean(np.square(np.asarray(a, np.float64) - b)))
        for a, r, b in zip(got, reference, truth, strict=True):
            assert rms(a, b) <= 1.5 * rms(r, b)

    def test_extreme_logits(self):
        """Logits of 1e4 and -1e4: exact weights, finite gradients, as far off as the plain reference's.

        dq and dk are the scale times a difference that rounding leaves where the weights are one-hot.
        """
        scale = 1e4
        arrays, options, truth = _case("float32", 5, 7, scale=scale, bias=(1, 3, 5, 7), mask=(2, 1, 1, 7))
        reference = jax.jit(functools.partial(outputs, functools.partial(_reference, options)))(arrays)
        limits = [
            2e-6 * max(size, np.max(np.abs(b))) + 4 * np.max(np.abs(np.asarray(a, np.float64) - b))
            for a, b, size in zip(reference, truth, (1, scale, scale, 1, 1), strict=True)
        ]
        assert_close(self.outputs(arrays, options), truth, limits)

    def test_a_query_that_sees_nothing_attends_evenly(self):
        """Whatever the bias; and its gradients but dv are zero."""
        (q, k, v, bias, dout), _, _ = case("bias")
        arrays, mask = (q, k, v, bias * 1e3, dout), np.zeros((1, 1, 1, 7), bool)
        out, dq, dk, dv, dbias = self.outputs(arrays, dict(mask=mask))
        np.testing.assert_allclose(out, np.broadcast_to(np.mean(v, 1, keepdims=True), q.shape), atol=2e-6)
        np.testing.assert_allclose(dv, np.broadcast_to(np.mean(dout, 1, keepdims=True) * 5 / 7, v.shape), atol=2e-6)
        for gradient in (dq, dk, dbias):
            np.testing.assert_array_equal(gradient, 0)

    @pytest.mark.parametrize("name", ["bias", "bias_of_example", "key_mask"])
    def test_vmap(self, name):
        arrays, options, truth = case(name)
        run = functools.partial(outputs, self.attend(**options))
        stack = lambda x: None if x is None else jnp.stack([x, x * 0.5])
        got = jax.jit(jax.vmap(run))([stack(x) for x in arrays])
        assert_close([x[0] for x in got], truth)
        half = [None if x is None else x * 0.5 for x in arrays]
        assert_close([x[1] for x in got], exact(*half, **options))

    def test_scan_and_remat(self):
        """Two layers of q <- attention(q, k, v), unrolled and as a rematerialised scan."""
        (q, k, v, _, dout), options, _ = case("key_mask_shared")
        v = v[:, : q.shape[1]]
        k, options = k[:, : q.shape[1]], dict(options, mask=options["mask"][..., : q.shape[1]])
        attend = self.attend(**options)

        def layers(loop):
            def stack(q, k, v):
                if loop:
                    body = jax.checkpoint(lambda q, _: (attend(q, k, v, None), None))
                    return jax.lax.scan(body, q, None, length=2)[0]
                return attend(attend(q, k, v, None), k, v, None)

            return jax.jit(jax.grad(lambda *x: jnp.vdot(stack(*x), dout), (0, 1, 2)))(q, k, v)

        for a, b in zip(layers(True), layers(False), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("by", ["batch", "heads"])
    def test_shard_map(self, by):
        """Batch or heads over devices; the bias is shared by the examples, so its gradient is a sum over devices."""
        arrays, options, truth = _case("float32", 5, 7, batch=4, heads=4, bias=(1, 4, 5, 7), causal=True)
        mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
        split = P("x") if by == "batch" else P(None, None, "x")
        bias = P() if by == "batch" else P(None, "x")
        attend = jax.shard_map(
            self.attend(**options), mesh=mesh, in_specs=(split, split, split, bias), out_specs=split,
            check_vma=self.check_vma,
        )  # fmt: skip
        assert_close(jax.jit(functools.partial(outputs, attend))(arrays), truth)


@functools.cache
def rounded(name):
    """What the plain reference makes of a case in bf16."""
    arrays, options, _ = case(name, "bfloat16")
    return jax.jit(functools.partial(outputs, functools.partial(_reference, options)))(arrays)


def _reference(options, q, k, v, bias):
    return kernels.attention(q, k, v, bias=bias, **options, implementation="reference")
