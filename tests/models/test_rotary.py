"""Rotary positions, and the norms inside blocks, against their equations."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.compare import close
from vlm_jax import models
from vlm_jax.errors import UserError
from vlm_jax.models.layers import Attention, Mlp, Norm
from vlm_jax.models.rotary import Rotary, rotate
from vlm_jax.models.vit import patchify

RNG = np.random.default_rng(0)
HEADS = RNG.standard_normal((2, 7, 3, 8)).astype(np.float32)  # a token without a place, and a grid of 2 x 3
IMAGES = RNG.standard_normal((2, 16, 24, 3)).astype(np.float32)


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize(
    ("fields", "rows", "columns"),
    [
        (dict(), [0, 1], [0, 1, 2]),
        (dict(offset=1.0, columns_first=True), [1, 2], [1, 2, 3]),
        (dict(reference=(4, 6)), [0, 2], [0, 2, 4]),
        (dict(centred=True), [-np.pi, np.pi], [-4 * np.pi / 3, 0, 4 * np.pi / 3]),
    ],
)
def test_channels_turn_as_complex_numbers(fields, rows, columns, halves):
    rotation = Rotary(temperature=100.0, halves=halves, **fields).rotation(2, 3, 8)
    speeds = 100.0 ** -np.array([0, 0.5])
    angles = []
    for row in rows:
        for column in columns:
            pair = [np.multiply(row, speeds), np.multiply(column, speeds)]
            angles.append(np.concatenate(pair[::-1] if fields.get("columns_first") else pair))
    turn = np.exp(1j * np.array(angles))[:, None]
    own = HEADS[:, 1:]
    x, y = (own[..., :4], own[..., 4:]) if halves else (own[..., ::2], own[..., 1::2])
    turned = (x + 1j * y) * turn
    parts = [turned.real, turned.imag]
    want = np.concatenate(parts, -1) if halves else np.stack(parts, -1).reshape(own.shape)
    got = rotate(jnp.asarray(HEADS), rotation)
    close(got[:, 1:], want)
    np.testing.assert_array_equal(got[:, 0], HEADS[:, 0])


def test_logits_depend_on_distances_alone():
    """Of rows and columns that are numbered: a move of both patches changes no product."""
    rotation = Rotary().rotation(5, 5, 8)
    same = jnp.broadcast_to(jnp.asarray(HEADS[:1, :1]), (1, 25, 3, 8))
    products = jnp.einsum("bqhd,bkhd->bhqk", rotate(same, rotation), rotate(same, rotation))[0, 0].reshape(5, 5, 5, 5)
    close(products[0, 0, 1, 2], products[2, 1, 3, 3])


def test_norms_of_queries_keys_and_branches():
    x = jnp.asarray(RNG.standard_normal((2, 5, 16)), jnp.float32)
    norm = functools.partial(Norm, eps=1e-5)
    attn = Attention(2, bias=("query", "out"), qk_norm=norm, out_norm=norm)
    mlp = Mlp(24, "silu", gated=True, norm=norm)
    p, q = (_random(jax.eval_shape(module.init, jax.random.key(0), x)["params"]) for module in (attn, mlp))
    assert "bias" in p["query"] and "bias" in p["out"] and "bias" not in p["key"] and "bias" not in p["value"]
    dense = lambda p, x: x @ p["kernel"] + p.get("bias", 0)
    normed = lambda p, x: norm().apply({"params": p}, x)
    split = lambda name: dense(p[name], x).reshape(2, 5, 2, 8)
    query, key = normed(p["query_norm"], split("query")), normed(p["key_norm"], split("key"))
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key) / 8**0.5)
    heads = jnp.einsum("bhqk,bkhd->bqhd", weights, split("value")).reshape(2, 5, 16)
    close(jax.jit(attn.apply)({"params": p}, x)[0], dense(p["out"], normed(p["norm"], heads)))
    hidden = jax.nn.silu(dense(q["gate"], x)) * dense(q["fc1"], x)
    close(jax.jit(mlp.apply)({"params": q}, x), dense(q["fc2"], normed(q["norm"], hidden)))


def _random(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * RNG.standard_normal(leaf.shape), jnp.float32), tree)


def tower(**fields):
    section = dict(width=32, depth=1, heads=2, patch=8, pool="gap", posemb="none", rotary=dict(reference=[4, 4]))
    return models.build(dict(image=section | fields, text=None)).image


def test_a_config_builds_them_and_their_order_counts():
    model = tower()
    assert model.rotary == Rotary(reference=(4, 4))
    params = _random(jax.eval_shape(model.init, jax.random.key(0), IMAGES)["params"])
    run = jax.jit(lambda images: model.apply({"params": params}, images).pooled)
    flipped = IMAGES[:, :, ::-1].reshape(2, 16, 3, 8, 3)[:, :, :, ::-1].reshape(IMAGES.shape)  # patches change places
    assert np.abs(run(IMAGES) - run(flipped)).max() > 1e-3
    with pytest.raises(UserError, match="rotary has no key `temprature`"):
        tower(rotary=dict(temprature=1.0))
    with pytest.raises(UserError, match="multiple of 4; got 6"):
        jax.eval_shape(tower(width=12).init, jax.random.key(0), IMAGES)
    with pytest.raises(UserError, match="packed patches need posemb `learned` alone"):
        packed = dict(patches=jnp.zeros((1, 4, 192)), grid=jnp.ones((1, 2), int))
        jax.eval_shape(tower(posemb="learned", image_size=16).init, jax.random.key(0), packed)
    with pytest.raises(UserError, match="post_norm is `after`"):
        jax.eval_shape(tower(post_norm="after").init, jax.random.key(0), IMAGES)


class OnTokens(models.ViT):
    """A tower of embedded patches, of which some are masked."""

    @nn.compact
    def __call__(self, x, seen):
        return self.encode(x, mask=seen, rotation=self.rotary.rotation(2, 3, 16)).tokens


def test_kept_patches_turn_by_their_own_places():
    """The tokens of kept patches are those of all patches, where the others are masked."""
    model = tower(keep=0.5)
    params = _random(jax.eval_shape(model.init, jax.random.key(0), IMAGES)["params"])

    def pooled(images):
        found = model.apply({"params": params}, images, train=True, rngs={"dropout": jax.random.key(3)})
        return found.pooled.sum(), found.tokens

    grads, tokens = jax.jit(jax.grad(pooled, has_aux=True))(IMAGES)
    seen = np.any(patchify(grads, 8).reshape(2, 6, -1), axis=-1)
    assert seen.sum(1).tolist() == [3, 3]
    patches = patchify(IMAGES, 8).reshape(2, 6, -1) @ params["patch_embed"]["kernel"] + params["patch_embed"]["bias"]
    whole = OnTokens(**{name: getattr(model, name) for name in ("width", "depth", "heads", "patch", "rotary")})
    own = {name: leaf for name, leaf in params.items() if name != "patch_embed"}
    close(tokens, np.asarray(jax.jit(whole.apply)({"params": own}, patches, seen))[seen].reshape(2, 3, -1))


def test_positions_that_count_what_is_no_padding():
    text = models.TextTransformer(
        width=16, depth=1, heads=2, vocab_size=9, length=5, posemb="counted", pad_id=1, pad_mask=True, pool="mean"
    )
    ids = jnp.array([[4, 5, 6, 1, 1], [1, 1, 4, 5, 6]])  # rows 2, 3, 4 in both
    params = _random(jax.eval_shape(text.init, jax.random.key(0), ids)["params"])
    assert params["pos_embed"].shape == (1, 7, 16)
    pooled = jax.jit(text.apply)({"params": params}, ids).pooled
    close(pooled[0], pooled[1])
