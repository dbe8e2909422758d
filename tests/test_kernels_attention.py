"""What every implementation of `kernels.attention` must pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax import kernels
from vlm_jax.errors import UserError
from vlm_jax.kernels.attention import IMPLEMENTATIONS

CASES = {
    "plain": dict(lq=5, lk=7),
    "long": dict(lq=50, lk=50, head_dim=32),
    "causal": dict(lq=6, lk=6, causal=True),
    "causal_cross": dict(lq=3, lk=6, causal=True),
    "key_mask": dict(lq=4, lk=9, mask=(2, 1, 1, 9)),
    "full_mask": dict(lq=4, lk=9, mask=(2, 3, 4, 9)),
    "bias": dict(lq=5, lk=7, bias=(1, 3, 5, 7)),
    "bias_and_mask": dict(lq=5, lk=7, bias=(2, 1, 1, 7), mask=(1, 1, 5, 7), causal=True),
    "scale": dict(lq=5, lk=7, scale=1.0),
    "one_key": dict(lq=5, lk=1),
}


def make(lq, lk, head_dim=8, bias=None, mask=None, **options):
    rng = np.random.default_rng(0)
    draw = lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    arrays = [draw((2, length, 3, head_dim)) for length in (lq, lk, lk)]
    arrays.append(None if bias is None else draw(bias))
    if mask is not None:
        mask = rng.random(mask) < 0.6
        mask[..., 0] = True
    return arrays, dict(mask=mask, **options)


def exact(q, k, v, bias, mask=None, causal=False, scale=None):
    """The equation in fp64, one query at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    logits_shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    bias = np.broadcast_to(0.0 if bias is None else bias, logits_shape)
    mask = np.broadcast_to(True if mask is None else mask, logits_shape)
    for b, h, i, _ in np.ndindex(*logits_shape[:3], 1):
        seen = mask[b, h, i] & (np.arange(k.shape[1]) <= (i if causal else k.shape[1]))
        logits = (q.shape[-1] ** -0.5 if scale is None else scale) * k[b, :, h] @ q[b, i, h] + bias[b, h, i]
        weights = np.exp(logits - logits[seen].max()) * seen
        out[b, i, h] = weights / weights.sum() @ v[b, :, h]
    return out


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values(implementation, case):
    (q, k, v, bias), options = make(**CASES[case])
    run = lambda q, k, v, bias: kernels.attention(q, k, v, bias=bias, **options, implementation=implementation)
    got = jax.jit(run)(q, k, v, bias)
    assert got.dtype == q.dtype
    np.testing.assert_allclose(got, exact(q, k, v, bias, **options), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["causal", "full_mask", "bias_and_mask"])
@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "reference"])
def test_gradients(implementation, case):
    arrays, options = make(**CASES[case])

    def grads(implementation):
        def score(q, k, v, bias):
            out = kernels.attention(q, k, v, bias=bias, **options, implementation=implementation)
            return jnp.sum(jnp.sin(3 * out))

        wanted = tuple(i for i, array in enumerate(arrays) if array is not None)
        return jax.jit(jax.grad(score, wanted))(*arrays)

    for got, want in zip(grads(implementation), grads("reference"), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bf16(implementation):
    (q, k, v, _), _ = make(lq=5, lk=7)
    low = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    got = kernels.attention(*low, implementation=implementation)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), exact(*low, None), atol=0.02)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_query_that_sees_nothing_stays_finite(implementation):
    (q, k, v, _), _ = make(lq=2, lk=3)
    mask = jnp.zeros((1, 1, 1, 3), bool)
    score = lambda q: kernels.attention(q, k, v, mask=mask, implementation=implementation).sum()
    out, grad = jax.jit(jax.value_and_grad(score))(q)
    np.testing.assert_allclose(out, 2 * v.mean(1).sum(), rtol=1e-4)
    assert bool(jnp.isfinite(grad).all())


def test_explain():
    x = jax.ShapeDtypeStruct((2, 5, 3, 8), jnp.float32)
    assert kernels.explain(x, x, x).implementation == "xla"
    assert kernels.explain(x, x, x, implementation="reference") == ("reference", "asked for by name")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(implementation="magic"), "`magic`; expected one of: reference, xla"),
        (dict(k=jnp.zeros((2, 7, 3, 4))), "one batch, heads and head_dim"),
        (dict(q=jnp.zeros((5, 3, 8))), r"\[batch, length, heads, head_dim\]"),
        (dict(bias=jnp.zeros((3, 5, 7))), "bias must broadcast"),
        (dict(mask=jnp.ones((2, 1, 1, 5), bool)), "mask must broadcast"),
        (dict(mask=jnp.ones((2, 1, 1, 7))), "mask must be bool"),
    ],
)
def test_mistakes_are_named(change, message):
    (q, k, v, _), _ = make(lq=5, lk=7)
    with pytest.raises(UserError, match=message):
        kernels.attention(**(dict(q=q, k=k, v=v) | change))
