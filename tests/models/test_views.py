"""Views of a picture: sizes other than the trained one, and patches that the tower does not see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.models import initial
from vlm_jax import models
from vlm_jax.errors import UserError
from vlm_jax.models.vit import patchify

SIZES = dict(width=32, depth=1, heads=2, patch=8, image_size=(16, 32))
RNG = np.random.default_rng(1)
IMAGES, LOCAL = (RNG.standard_normal((4, *size, 3)).astype(np.float32) for size in ((16, 32), (24, 16)))
TOKEN = RNG.standard_normal(32).astype(np.float32)


def test_other_sizes_have_resampled_positions_and_the_own_size_those_that_are_learned():
    plain, any_size = models.ViT(**SIZES), models.ViT(**SIZES, any_size=True)
    params = {"params": initial(plain, IMAGES)}
    np.testing.assert_array_equal(any_size.apply(params, IMAGES).tokens, plain.apply(params, IMAGES).tokens)
    packed = dict(patches=patchify(LOCAL, 8).reshape(4, 6, -1), grid=np.full((4, 2), (3, 2)))
    want = plain.apply(params, packed).tokens  # as NaFlex, which Transformers checks
    np.testing.assert_allclose(any_size.apply(params, LOCAL).tokens, want, rtol=1e-5, atol=1e-5)
    again = jax.eval_shape(any_size.init, jax.random.key(0), LOCAL)["params"]
    assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, params["params"])


def test_the_row_of_a_class_token_stays():
    options = SIZES | dict(pool="tok", cls_position=True, any_size=True)
    model = models.ViT(**options)
    params = initial(model, IMAGES)
    moved = params | {"pos_embed": params["pos_embed"].at[:, 1:].set(0.0)}
    bare = models.ViT(**options | dict(image_size=(24, 16)))
    fewer = moved | {"pos_embed": moved["pos_embed"][:, :7]}
    np.testing.assert_allclose(
        model.apply({"params": moved}, LOCAL).pooled, bare.apply({"params": fewer}, LOCAL).pooled, rtol=1e-5, atol=1e-6
    )


def test_hidden_patches_are_not_seen():
    """Their pixels have no gradient; all others and the token have one. Nothing hidden changes nothing."""
    model = models.ViT(**SIZES, pool="map")
    params = {"params": initial(model, IMAGES)}
    where = np.arange(8) % 3 == np.arange(4)[:, None] % 3

    def pooled(images, token):
        return jnp.sum(model.apply(params, images, hidden=(where, token)).pooled ** 2)

    of_pixels, of_token = jax.jit(jax.grad(pooled, (0, 1)))(IMAGES, TOKEN)
    seen = np.any(patchify(np.asarray(of_pixels), 8).reshape(4, 8, -1), axis=-1)
    np.testing.assert_array_equal(seen, ~where)
    assert np.all(of_token != 0)
    nothing = model.apply(params, IMAGES, hidden=(np.zeros((4, 8), bool), TOKEN)).pooled
    np.testing.assert_array_equal(nothing, model.apply(params, IMAGES).pooled)


def test_what_does_not_fit_is_named():
    params = {"params": initial(models.ViT(**SIZES), IMAGES)}
    with pytest.raises(UserError, match=r"hidden patches should be bool \[4, 8\] with keep 1.0; got \[4, 9\]"):
        models.ViT(**SIZES).apply(params, IMAGES, hidden=(np.zeros((4, 9), bool), TOKEN))
    with pytest.raises(UserError, match="any_size needs an image_size"):
        models.ViT(**SIZES | dict(image_size=None), any_size=True).apply(params, IMAGES)
    with pytest.raises(UserError, match="images of 4 x 4 are smaller than a patch of 8"):
        models.ViT(**SIZES, any_size=True).apply(params, np.zeros((4, 4, 4, 3)))
