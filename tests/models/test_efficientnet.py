import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.errors import UserError
from vlm_jax.models.convolutions import FrozenBatchNorm, depthwise
from vlm_jax.models.efficientnet import EfficientNetLite, block_sizes, lookup
from vlm_jax.params.table import named_leaves

KEY = jax.random.key(0)
IMAGES = jnp.asarray(np.random.default_rng(1).standard_normal((1, 33, 64, 3)), jnp.float32)


@pytest.mark.parametrize(
    ("variant", "blocks", "millions"),  # as the TensorFlow release states them
    [("lite0", 16, 4.652), ("lite1", 21, 5.417), ("lite2", 21, 6.092), ("lite3", 24, 8.197), ("lite4", 30, 13.007)],
)
def test_variants(variant, blocks, millions):
    model = EfficientNetLite(**lookup(variant), out_dim=1000)
    shapes = named_leaves(jax.eval_shape(model.init, KEY, IMAGES)["params"])
    learned = {name: leaf for name, leaf in shapes.items() if not name.endswith(("norm/mean", "norm/var"))}
    assert len(block_sizes(**lookup(variant))) == blocks
    assert round(sum(leaf.size for leaf in learned.values()) / 1e6, 3) == millions
    assert shapes["stem/conv/kernel"].shape == (3, 3, 3, 32) and shapes["head/kernel"].shape == (1280, 1000)


def test_unknown_variant():
    with pytest.raises(UserError, match="variant is `b0`; expected one of: lite0"):
        lookup("b0")


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [(3, 1, "SAME"), (5, 2, "SAME"), (3, 2, "VALID"), (7, 1, "SAME"), (7, 2, ((3, 2), (3, 3)))],
)
def test_depthwise(kernel, stride, padding):
    """Values and gradients of what runs on a CPU equal the grouped convolution's, at odd and even sizes."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 9, 12, 4)), jnp.float32)
    weights = jnp.asarray(rng.standard_normal((kernel, kernel, 1, 4)), jnp.float32)
    options = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=4)

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_grads(conv, x, weights):
        fn = lambda x, weights: conv(x, weights, (stride, stride), padding, **options)
        out, pull = jax.vjp(fn, x, weights)
        return out, *pull(jnp.cos(out))

    for got, want in zip(
        value_and_grads(depthwise, x, weights),
        value_and_grads(jax.lax.conv_general_dilated, x, weights),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_frozen_batch_norm():
    x = jnp.array([[1.0, 2.0], [3.0, -4.0]])
    params = dict(mean=jnp.array([1.0, -1.0]), var=jnp.array([0.0, 4.0]), scale=jnp.array([2.0, 3.0]), bias=jnp.ones(2))
    apply = lambda params: FrozenBatchNorm().apply({"params": params}, x)
    want = [[1.0, 3 * 3 / 4.001**0.5 + 1], [2 * 2 / 0.001**0.5 + 1, 3 * -3 / 4.001**0.5 + 1]]
    np.testing.assert_allclose(apply(params), want, rtol=1e-6)
    grads = jax.grad(lambda params: apply(params).sum())(params)
    np.testing.assert_array_equal(grads["mean"], 0)
    np.testing.assert_array_equal(grads["var"], 0)
    np.testing.assert_allclose(grads["bias"], 2)


@pytest.mark.parametrize(
    ("fields", "pooled"),
    [({}, (2, 16)), (dict(pool="max"), (2, 16)), (dict(out_dim=3), (2, 3)), (dict(pool="none"), None)],
)
def test_outputs(fields, pooled):
    model = EfficientNetLite(stem_width=8, head_width=16, dtype="bfloat16", **fields)
    encoded, _ = jax.eval_shape(model.init_with_output, KEY, jax.ShapeDtypeStruct((2, 33, 64, 3), jnp.float32))
    assert encoded.tokens.shape == (2, 2 * 2, 16) and encoded.tokens.dtype == jnp.bfloat16 and encoded.mask is None
    assert pooled == (encoded.pooled if pooled is None else encoded.pooled.shape)


@pytest.mark.parametrize(
    ("fields", "images", "message"),
    [
        (dict(pool="map"), IMAGES, "pool is `map`; an EfficientNet has one of"),
        (dict(pool="none", out_dim=3), IMAGES, "leave out_dim unset"),
        ({}, IMAGES[0], r"images should be \[B, H, W, 3\]; got \[33, 64, 3\]"),
        ({}, IMAGES.astype(jnp.uint8), "got uint8: add normalize"),
    ],
)
def test_errors(fields, images, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(EfficientNetLite(**fields).init, KEY, images)
