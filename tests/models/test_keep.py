"""Patch dropout: training sees a share of each picture's patches, and nothing of the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax import models
from vlm_jax.errors import UserError

SIZES = dict(width=32, depth=1, heads=2, patch=8)
IMAGES = jnp.asarray(np.random.default_rng(1).standard_normal((4, 16, 32, 3)), jnp.float32)  # 2 x 4 patches


def parameters(model, images):
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(0.3 * rng.standard_normal(s.shape), s.dtype), shapes)


def seen(model, params, inputs, pick=lambda x: x, key=1):
    """(pooled, the gradient of its sum by the pictures) in training."""

    def pooled(inputs):
        found = model.apply({"params": params}, inputs, train=True, rngs={"dropout": jax.random.key(key)}).pooled
        return jnp.sum(found), found

    (_, found), grads = jax.jit(jax.value_and_grad(pooled, has_aux=True, allow_int=True))(inputs)
    return found, pick(grads)


def patches(images):
    """[B, 8, 8 * 8 * 3] of IMAGES' size, by a loop."""
    cut = [images[:, y : y + 8, x : x + 8] for y in (0, 8) for x in range(0, 32, 8)]
    return np.stack([np.asarray(patch).reshape(len(images), -1) for patch in cut], 1)


@pytest.mark.parametrize("pool", ["tok", "gap", "map"])
def test_a_picture_is_as_if_it_had_only_the_kept_patches(pool):
    options = SIZES | dict(pool=pool, cls_position=pool == "tok")
    model = models.ViT(**options, keep=0.4)
    params = parameters(model, IMAGES)
    pooled, grads = seen(model, params, IMAGES)
    kept = np.any(patches(grads), axis=2)
    assert kept.sum(1).tolist() == [3] * 4 and len({tuple(row) for row in kept.tolist()}) > 1  # round(0.4 * 8)
    first = pool == "tok"
    for image, own, want in zip(patches(IMAGES), kept, pooled, strict=True):
        small = np.concatenate(image[own].reshape(3, 8, 8, 3), axis=1)[None]  # 1 x 3 patches
        rows = np.concatenate([np.arange(first), first + np.flatnonzero(own)])
        fewer = params | {"pos_embed": params["pos_embed"][:, rows]}
        found = jax.jit(models.ViT(**options).apply)({"params": fewer}, small).pooled[0]
        np.testing.assert_allclose(found, want, rtol=2e-5, atol=2e-5)


def test_evaluation_sees_all_and_one_keeps_all():
    model, whole = models.ViT(**SIZES, keep=0.5), models.ViT(**SIZES, keep=1.0)
    params = parameters(whole, IMAGES)
    want = jax.jit(whole.apply)({"params": params}, IMAGES).pooled
    np.testing.assert_array_equal(jax.jit(model.apply)({"params": params}, IMAGES).pooled, want)
    np.testing.assert_allclose(seen(whole, params, IMAGES)[0], want, rtol=1e-6)


def test_patches_that_are_named_are_seen_alone():
    """In evaluation as well; all of them is the whole picture; each picture has its own."""
    model = models.ViT(**SIZES, pool="tok")
    params, kept = parameters(model, IMAGES), np.array([[0, 2, 5], [1, 2, 3], [4, 6, 7], [0, 1, 7]])
    run = jax.jit(lambda images, kept: model.apply({"params": params}, images, kept=kept))
    whole = jax.jit(lambda images: model.apply({"params": params}, images))(IMAGES)
    np.testing.assert_array_equal(run(IMAGES, np.tile(np.arange(8), (4, 1))).tokens, whole.tokens)
    found = run(IMAGES, kept)
    assert found.tokens.shape == (4, 1 + 3, 32)
    of_own = jax.jit(jax.grad(lambda images: jnp.sum(run(images, kept).pooled)))(IMAGES)
    seen = [np.flatnonzero(row).tolist() for row in np.any(patches(of_own), axis=2)]
    assert seen == kept.tolist()
    with pytest.raises(UserError, match="kept patches are of pictures of one size, and of a pool other than `concat`"):
        models.ViT(**SIZES, pool="concat").apply({"params": params}, IMAGES, kept=kept)


def test_masks_follow_their_key():
    model = models.ViT(**SIZES, keep=0.5)
    params = parameters(model, IMAGES)
    one, again, other = (seen(model, params, IMAGES, key=key)[0] for key in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3


def test_packed_pictures_keep_a_share_of_their_own_patches():
    rng = np.random.default_rng(2)
    inputs = dict(patches=rng.normal(size=(3, 10, 192)).astype(np.float32), grid=np.array([[2, 5], [2, 2], [1, 1]]))
    model = models.ViT(**SIZES, image_size=32, keep=0.5)
    params = parameters(model, inputs)
    _, grads = seen(model, params, inputs, lambda grads: grads["patches"])
    kept = np.any(grads, axis=2)
    assert kept.sum(1).tolist() == [5, 2, 1]  # at least one
    assert not kept[1, 4:].any() and not kept[2, 1:].any()


@pytest.mark.parametrize("options", [dict(keep=0.0), dict(keep=1.5), dict(keep=0.5, pool="concat")])
def test_shares_that_cannot_be_are_named(options):
    model = models.ViT(**SIZES | options)
    with pytest.raises(UserError, match=r"keep is .*; expected above 0, at most 1"):
        model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, IMAGES, train=True)
