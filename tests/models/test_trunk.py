"""Towers that share their blocks: the model whose towers have equal blocks, with the sum of both gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.models import IMAGES, TOKENS, initial, section
from vlm_jax import models
from vlm_jax.errors import UserError
from vlm_jax.params.table import named_leaves

SMALL = dict(width=8, depth=1, mlp_dim=16)


def config(**options):
    base = section("two_tower")
    return base | {side: base[side] | SMALL for side in ("image", "text")} | options


def test_a_shared_trunk_is_two_towers_with_equal_blocks():
    shared, plain = models.build(config(shared=True)), models.build(config())
    params = initial(shared, IMAGES, TOKENS)
    own = lambda name: name.startswith(("trunk/", "logit_"))
    apart = {name.partition("/")[2] for name in named_leaves(params) if not own(name)}
    assert apart == {"patch_embed/bias", "patch_embed/kernel", "pos_embed", "token_embed/embedding"}

    def twice(params):
        return {side: params[side] | params["trunk"] for side in ("image", "text")} | {
            "logit_scale": params["logit_scale"]
        }

    def value(model, params):
        found = model.apply({"params": params}, IMAGES, TOKENS)
        return jnp.sum(jnp.sin(found.scale * found.image @ found.text.T)), found

    (loss, found), grads = jax.jit(lambda p: jax.value_and_grad(lambda p: value(shared, p), has_aux=True)(p))(params)
    (other, want), of_twice = jax.jit(lambda p: jax.value_and_grad(lambda p: value(plain, p), has_aux=True)(p))(
        twice(params)
    )
    jax.tree.map(np.testing.assert_array_equal, (loss, found), (other, want))
    for name, grad in named_leaves(grads["trunk"]).items():
        both = sum(named_leaves(of_twice[side])[name] for side in ("image", "text"))
        np.testing.assert_allclose(grad, both, rtol=1e-5, atol=1e-5)
    text = shared.apply({"params": params}, None, TOKENS).text
    np.testing.assert_allclose(text, found.text, atol=1e-6)  # one tower alone finds the trunk


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (dict(mlp_dim=24), "mlp_dim is 16 in image and 24 in text; give both one value"),
        (dict(out_dim=4), "out_dim is 16 in image and 4 in text"),
        (None, "config.model.shared: the towers share their blocks and head, but .* in image and None in text"),
    ],
)
def test_towers_that_differ_are_named(text, message):
    base = config(shared=True)
    with pytest.raises(UserError, match=message):
        models.build(base | {"text": text and base["text"] | text})
