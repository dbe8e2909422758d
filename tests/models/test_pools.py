"""The mean of patches, the last norm before or after it, and what follows: from the tokens, by numpy."""

import jax
import numpy as np
import pytest

from vlm_jax import models
from vlm_jax.errors import UserError

SIZES = dict(width=8, depth=1, heads=2, mlp_dim=8, patch=4, image_size=8, cls=True, registers=2, pool="patches")
IMAGES = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)


def run(**fields):
    model = models.ViT(**SIZES, **fields)
    params = model.init(jax.random.key(0), IMAGES)["params"]
    params = jax.tree.map(lambda leaf: np.random.default_rng(1).normal(size=leaf.shape).astype(np.float32), params)
    return model.apply({"params": params}, IMAGES), params


def normed(x, norm):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * norm["scale"] + norm["bias"]


def test_the_last_norm():
    bare, params = run(final_norm="none")
    assert "norm" not in params
    mean = np.asarray(bare.tokens)[:, 3:].mean(1)
    np.testing.assert_allclose(bare.pooled, mean, rtol=1e-5, atol=1e-6)
    pooled, params = run(final_norm="pooled")
    mean = np.asarray(pooled.tokens)[:, 3:].mean(1)
    np.testing.assert_allclose(pooled.pooled, normed(mean, params["norm"]), rtol=1e-4, atol=1e-5)
    usual, _ = run()
    np.testing.assert_allclose(usual.tokens, normed(np.asarray(pooled.tokens), params["norm"]), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="final_norm is `last`; expected one of: tokens, pooled, none"):
        run(final_norm="last")


def test_the_activation_of_the_representation():
    bare, params = run(final_norm="none", rep_dim=4, rep_activation="relu")
    dense = np.asarray(bare.tokens)[:, 3:].mean(1) @ params["rep"]["kernel"] + params["rep"]["bias"]
    np.testing.assert_allclose(bare.pooled, np.maximum(dense, 0), rtol=1e-5, atol=1e-5)
