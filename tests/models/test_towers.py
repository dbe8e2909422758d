import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax import models
from vlm_jax.errors import UserError
from vlm_jax.models.layers import Mlp, Norm
from vlm_jax.models.vit import patchify

SIZES = dict(width=32, depth=1, heads=2)
KEY = jax.random.key(0)
IMAGES = jnp.asarray(np.random.default_rng(1).standard_normal((2, 16, 24, 3)), jnp.float32)
TOKENS = jnp.array([[7, 9, 4, 2, 0, 0], [5, 2, 0, 0, 0, 0]])  # 2 ends a text, 0 pads it


def vit(**fields):
    return models.ViT(**{**SIZES, "patch": 8, **fields})


def text(**fields):
    return models.TextTransformer(**{**SIZES, "vocab_size": 10, "length": 6, **fields})


def run(model, inputs):
    """(params, encoded) with every parameter random, biases and scales included."""
    shapes = jax.eval_shape(model.init, KEY, inputs)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(0.3 * rng.standard_normal(s.shape), s.dtype), shapes)
    return params, apply(model, params, inputs)


def apply(model, params, inputs, **options):
    return jax.jit(functools.partial(model.apply, **options))({"params": params}, inputs)


def test_patchify_is_a_valid_convolution():
    kernel = jax.random.normal(KEY, (5, 5, 3, 4))
    want = jax.lax.conv_general_dilated(IMAGES, kernel, (5, 5), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    got = patchify(IMAGES, 5) @ kernel.reshape(-1, 4)  # 16 x 24 pixels: 3 x 4 patches, the rest dropped
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pool", ["gap", "max", "concat", "tok", "map"])
def test_vit_pools(pool):
    params, encoded = run(vit(pool=pool), IMAGES)
    tokens = encoded.tokens
    assert tokens.shape == (2, 7 if pool == "tok" else 6, 32)
    want = {
        "gap": lambda: tokens.mean(1),
        "max": lambda: tokens.max(1),
        "concat": lambda: tokens.reshape(2, -1),
        "tok": lambda: tokens[:, 0],
        "map": lambda: encoded.pooled,
    }[pool]()
    np.testing.assert_allclose(encoded.pooled, want, atol=1e-6)
    assert ("cls" in params) == (pool == "tok")
    assert encoded.pooled.shape == (2, 6 * 32 if pool == "concat" else 32)


def test_vit_without_pool():
    _, encoded = run(vit(pool="none"), IMAGES)
    assert encoded.pooled is None and encoded.tokens.shape == (2, 6, 32)


def test_openai_clip_stem():
    model = vit(pool="tok", cls_position=True, patch_bias=False, pre_norm=True, out_dim=8, head_bias=False)
    params, _ = run(model, IMAGES)
    assert params["pos_embed"].shape == (1, 7, 32)  # row 0 belongs to cls
    assert set(params["patch_embed"]) == {"kernel"} and set(params["head"]) == {"kernel"}
    assert set(params["pre_norm"]) == {"scale", "bias"}
    moved = jax.tree.map(lambda x: x, params)
    row = jax.random.normal(KEY, (1, 1, 32))
    moved["cls"], moved["pos_embed"] = params["cls"] + row, params["pos_embed"].at[:, :1].add(-row)
    a, b = (apply(model, p, IMAGES).pooled for p in (params, moved))
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("pool", "want"),
    [
        ("last", lambda t: t[:, -1]),
        ("first", lambda t: t[:, 0]),
        ("eos", lambda t: t[jnp.arange(2), jnp.array([3, 1])]),
        ("argmax", lambda t: t[jnp.arange(2), jnp.array([1, 0])]),
        ("mean", lambda t: t.mean(1)),
        ("max", lambda t: t.max(1)),
        ("concat", lambda t: t.reshape(2, -1)),
    ],
)
def test_text_pools(pool, want):
    _, encoded = run(text(pool=pool, eos_id=2), TOKENS)
    np.testing.assert_allclose(encoded.pooled, want(encoded.tokens), atol=1e-6)


@pytest.mark.parametrize("pool", ["mean", "max", "map"])
def test_padding_is_invisible(pool):
    """With pad_mask, a text means the same whatever the length it is padded to."""
    model = text(pool=pool, pad_mask=True)
    params, encoded = run(model, TOKENS)
    np.testing.assert_array_equal(encoded.mask, TOKENS != 0)
    short = apply(model, params, TOKENS[1:, :2])
    np.testing.assert_allclose(encoded.pooled[1], short.pooled[0], rtol=1e-6, atol=1e-6)


def test_pool_exclude():
    model = text(pool="mean", pad_mask=True, pool_exclude=(2,))
    _, encoded = run(model, TOKENS)
    np.testing.assert_allclose(encoded.pooled[0], encoded.tokens[0, :3].mean(0), atol=1e-6)
    np.testing.assert_allclose(encoded.pooled[1], encoded.tokens[1, 0], atol=1e-6)


@pytest.mark.parametrize("pool", ["mean", "max", "map", "concat"])
def test_an_empty_text_stays_finite(pool):
    model = text(pool=pool, pad_mask=True)
    empty = jnp.zeros((1, 6), jnp.int32)
    params, encoded = run(model, empty)
    grads = jax.jit(jax.grad(lambda p: model.apply({"params": p}, empty).pooled.sum()))(params)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((encoded.pooled, grads)))


def test_causal():
    model = text(causal=True)
    params, encoded = run(model, TOKENS)
    changed = apply(model, params, TOKENS.at[:, 3].set(8))
    np.testing.assert_allclose(encoded.tokens[:, :3], changed.tokens[:, :3], atol=1e-6)
    assert float(jnp.abs(encoded.tokens[:, 3:] - changed.tokens[:, 3:]).max()) > 1e-2


def test_embed_std():
    params = jax.jit(text(vocab_size=1000, embed_std=0.5).init)(KEY, TOKENS)["params"]
    np.testing.assert_allclose(jnp.std(params["token_embed"]["embedding"]), 0.5, rtol=0.03)


def test_optional_layers():
    model = vit(gated=True, norm="rmsnorm", attn_bias=False, mlp_bias=False, layer_scale=0.1, posemb="none", head_dim=8)
    params = jax.jit(model.init)(KEY, IMAGES)["params"]
    block = params["blocks_0"]
    assert set(block) == {"norm1", "attn", "layer_scale1", "norm2", "mlp", "layer_scale2"}
    assert set(block["mlp"]) == {"fc1", "fc2", "gate"} and set(block["mlp"]["fc1"]) == {"kernel"}
    assert set(block["norm1"]) == {"scale"} and block["attn"]["query"]["kernel"].shape == (32, 16)
    np.testing.assert_allclose(block["layer_scale1"], 0.1)
    assert "pos_embed" not in params


def test_rates_of_zero_need_no_rng():
    params, still = run(vit(), IMAGES)
    np.testing.assert_allclose(apply(vit(), params, IMAGES, train=True).pooled, still.pooled, atol=1e-6)


def test_dropout_follows_its_rng():
    model = vit(drop_path=0.5, dropout=0.2)
    params, still = run(model, IMAGES)
    noisy = jax.jit(lambda key: model.apply({"params": params}, IMAGES, train=True, rngs={"dropout": key}).pooled)
    a, b, c = noisy(jax.random.key(1)), noisy(jax.random.key(1)), noisy(jax.random.key(2))
    np.testing.assert_array_equal(a, b)
    assert float(jnp.abs(a - c).max()) > 1e-2 and float(jnp.abs(a - still.pooled).max()) > 1e-2


@pytest.mark.parametrize("scan", [False, True])
def test_drop_path_drops_a_whole_branch_per_example(scan):
    model = vit(depth=2, drop_path=0.5, scan=scan)
    images = jnp.broadcast_to(IMAGES[:1], (64, *IMAGES.shape[1:]))
    params, _ = run(model, images)
    out = apply(model, params, images, train=True, rngs={"dropout": KEY}).pooled
    assert len(np.unique(np.round(out[:, 0], 4))) == 4  # the last block's two branches, each there or not


def test_norm_matches_its_equation():
    x = 100 + jax.random.normal(KEY, (2, 3, 64))
    layer = Norm().apply({"params": {"scale": jnp.full(64, 2.0), "bias": jnp.full(64, 0.5)}}, x)
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(layer, 2 * exact + 0.5, atol=1e-4)  # a one-pass variance would be off by 1e-2 here
    rms = Norm("rmsnorm").apply({"params": {"scale": jnp.ones(64)}}, x)
    np.testing.assert_allclose(rms, x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6), rtol=1e-5)


def test_activations_match_their_equations():
    x = jnp.linspace(-3, 3, 32)[None, None]
    eye = {"kernel": jnp.eye(32)}
    erf = np.vectorize(math.erf)
    want = {
        "gelu": x * 0.5 * (1 + erf(np.asarray(x) / np.sqrt(2))),
        "gelu_tanh": 0.5 * x * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
        "quick_gelu": x / (1 + jnp.exp(-1.702 * x)),
        "silu": x / (1 + jnp.exp(-x)),
        "relu": jnp.maximum(x, 0),
    }
    for name, value in want.items():
        got = Mlp(32, name, bias=False).apply({"params": {"fc1": eye, "fc2": eye}}, x)
        np.testing.assert_allclose(got, value, atol=1e-5, err_msg=name)
    gated = Mlp(32, "silu", gated=True, bias=False).apply({"params": {"fc1": eye, "fc2": eye, "gate": eye}}, x)
    np.testing.assert_allclose(gated, want["silu"] * x, atol=1e-5)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (jnp.zeros((16, 24, 3)), r"images should be \[B, H, W, 3\]; got \[16, 24, 3\]"),
        (jnp.zeros((1, 16, 24, 1)), r"got \[1, 16, 24, 1\]"),
        (jnp.zeros((1, 32, 24, 3)), r"12 positions\), the position table has 6"),
        (jnp.zeros((1, 4, 24, 3)), "smaller than a patch of 8"),
        (jnp.zeros((1, 16, 24, 3), jnp.uint8), "got uint8"),
    ],
)
def test_images_are_checked(images, message):
    params = jax.eval_shape(vit().init, KEY, IMAGES)["params"]
    with pytest.raises(UserError, match=message):
        jax.eval_shape(vit().apply, {"params": params}, images)


def test_image_size_is_checked():
    with pytest.raises(UserError, match=r"images should be \[B, 24, 16, 3\]; got \[2, 16, 24, 3\]"):
        vit(image_size=(24, 16)).init(KEY, IMAGES)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (jnp.zeros((1, 7), jnp.int32), "L <= 6"),
        (jnp.zeros(6, jnp.int32), "L <= 6"),
        (jnp.zeros((1, 6)), "got float32"),
    ],
)
def test_tokens_are_checked(tokens, message):
    params = jax.eval_shape(text().init, KEY, TOKENS)["params"]
    with pytest.raises(UserError, match=message):
        jax.eval_shape(text().apply, {"params": params}, tokens)
