"""In float64, models are exact enough for central differences: nothing is rounded to float32 on the way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.models import IMAGES, TOKENS, initial, section
from vlm_jax import models
from vlm_jax.models.token_loss import token_loss

PARTS = {  # the parts of a model differ, so that few models run many of them
    "two_tower": dict(image=dict(pool="map", posemb="sincos2d"), text=dict(pool="mean", pad_mask=True)),
    "captioner": dict(image=dict(norm="rmsnorm"), decoder=dict(relative_buckets=8, posemb="none", tied_scale=0.2)),
    "coca": {},
}


def build(kind):
    config = section(kind, scan=kind == "coca") | {"dtype": "float64"}
    for side in {"image", "text", "decoder"} & config.keys():
        config[side] = config[side] | {"depth": 1} | PARTS[kind].get(side, {})
    return models.build(config)


def outputs(model, params):
    """Everything that a loss reads."""
    apply = lambda *args, **options: model.apply({"params": params}, *args, **options)
    found = [apply(IMAGES.astype(np.float64), TOKENS)]
    if "describe" in model.can:
        hidden = apply(IMAGES.astype(np.float64), TOKENS, method="hidden")
        found.append(token_loss(lambda x: apply(x, method="logits"), hidden, TOKENS, z_loss=0.1, chunk=4))
    return found


def dot(a, b):
    return sum(map(jnp.vdot, *map(jax.tree.leaves, (a, b))))


@pytest.mark.parametrize("kind", PARTS)
def test_gradients_are_central_differences(kind):
    with jax.enable_x64(True):
        model, rng = build(kind), np.random.default_rng(0)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), initial(model, IMAGES, TOKENS))
        shapes = jax.eval_shape(lambda params: outputs(model, params), params)
        assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float64")}
        weights = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), shapes)
        total = lambda params: dot(weights, outputs(model, params))
        value_and_grad = jax.jit(jax.value_and_grad(total))
        gradient = value_and_grad(params)[1]
        for _ in range(3):
            step = jax.tree.map(lambda leaf: 1e-6 * rng.standard_normal(leaf.shape), params)
            ahead, behind = (
                value_and_grad(jax.tree.map(lambda a, b, s=sign: a + s * b, params, step))[0] for sign in (1, -1)
            )
            np.testing.assert_allclose(ahead - behind, 2 * dot(gradient, step), rtol=1e-6)
