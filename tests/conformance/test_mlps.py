"""What every MLP has to do that takes the place of a block's own: it enters by being declared."""

import functools

import jax
import numpy as np
import pytest

from tests.support.models import IMAGES, TOKENS, initial, run, section
from vlm_jax import catalogue, models
from vlm_jax.errors import UserError
from vlm_jax.params import sharding

MLPS = catalogue.of("mlps")


def settings(name):
    config = section("two_tower", scan=True)
    return config | {"image": config["image"] | {"mlp": name}}


@functools.cache
def ready(name):
    model = models.build(settings(name))
    return model, initial(model, IMAGES, TOKENS)


@functools.partial(jax.jit, static_argnums=0)
def encode(model, params, images):
    return model.apply({"params": params}, images, method=lambda model, images: model.image(images))


@pytest.mark.parametrize("name", MLPS)
def test_rows_do_not_depend_on_each_other(name):
    model, params = ready(name)
    both, one = (encode(model, params, images) for images in (IMAGES, IMAGES[:1]))
    for rows in jax.tree.leaves(both.aux):
        assert rows.shape[:2] == (len(IMAGES), model.image.depth)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda rows, alone: close(rows[:1], alone), both, one)


@pytest.mark.parametrize("name", MLPS)
def test_eight_devices_compute_what_one_does(name):
    model, params = ready(name)
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    place = sharding.param_shardings(sharding.RULES, params, mesh)
    blocks = jax.tree.leaves(place["image"]["blocks"]["mlp"])
    assert any("tensor" in leaf.spec for leaf in blocks), "no rule splits a matrix"
    with jax.set_mesh(mesh):
        spread = run(model, jax.device_put(params, place), IMAGES, TOKENS)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
    jax.tree.map(close, spread, run(model, params, IMAGES, TOKENS))


@pytest.mark.parametrize("name", MLPS)
def test_a_mistyped_key_is_named(name):
    with pytest.raises(UserError, match="nonsense") as error:
        models.build(settings({"name": name, "nonsense": 1}))
    assert "\n" not in str(error.value)
