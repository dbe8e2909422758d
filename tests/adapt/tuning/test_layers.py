"""Tuning by layers: the rates, what begins anew, Adam without correction, and what is full tuning exactly."""

import jax
import numpy as np
import optax
import pytest

from tests.support.few_shot import plain
from vlm_jax.adapt.tuning import layers
from vlm_jax.errors import UserError
from vlm_jax.params import optim, transforms
from vlm_jax.params.table import named_leaves


def test_limits(base):
    assert plain(layers.layer_decay(base.model, decay=1.0))
    leaves = named_leaves(base.params)
    begun = layers.new_top(base.model, blocks=0).begin(jax.random.key(0), base.model, leaves)
    assert all(begun[name] is leaf for name, leaf in leaves.items())
    with pytest.raises(UserError, match="decay of layer_decay is 0"):
        layers.layer_decay(base.model, decay=0)
    with pytest.raises(UserError, match="blocks is 4; `image/` has 3 blocks"):
        layers.new_top(base.model, blocks=4).begin(jax.random.key(0), base.model, leaves)
    with pytest.raises(UserError, match="no blocks in `audio/`"):
        layers.new_top(base.model, tower="audio").begin(jax.random.key(0), base.model, leaves)


def test_rates_fall_with_depth(base):
    """Sign descent moves each scalar by its rate: block i of three by decay^(4 - i), what follows by 1."""
    recipe, leaves = layers.layer_decay(base.model, decay=0.5, last=2), named_leaves(base.params)
    own = recipe.begin(None, base.model, leaves)
    section = {"name": "sign_sgd", "lr": 0.01, "schedule": {"name": "constant"}, **recipe.optimizer}
    tx = optim.build(section, own, total_steps=1)[0]
    updates = tx.update(jax.tree.map(np.ones_like, own), tx.init(own), own)[0]
    np.testing.assert_allclose(-updates["image/blocks/mlp/fc1/kernel"][:, 0, 0], [0.0025, 0.005], rtol=1e-6)
    np.testing.assert_allclose(-updates["text/head/kernel"], 0.01, rtol=1e-6)
    assert not any("embed" in name for name in own)


def test_the_top_begins_anew(base):
    leaves = named_leaves(base.params)
    begin = lambda **options: layers.new_top(base.model, **options).begin(jax.random.key(1), base.model, leaves)
    own = begin(blocks=2, after=True)
    for name, leaf in leaves.items():
        anew = name.startswith("image/blocks/") or name.startswith(("image/head", "image/norm"))
        if not anew:
            np.testing.assert_array_equal(own[name], leaf)
        elif name.startswith("image/blocks/"):
            np.testing.assert_array_equal(own[name][0], leaf[0])
    kernel = np.asarray(own["image/blocks/mlp/fc1/kernel"][1:])
    np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.1)
    assert not np.any(own["image/blocks/mlp/fc1/bias"][1:]) and np.all(own["image/blocks/norm1/scale"][1:] == 1)
    np.testing.assert_array_equal(begin(blocks=2)["image/head/kernel"], leaves["image/head/kernel"])


def test_adam_without_correction():
    """Against a loop over the moments; with correction it is AdamW."""
    rng = np.random.default_rng(0)
    p, gradients = rng.normal(size=3), rng.normal(size=(4, 3))
    tx = transforms.bert_adam(0.1, 0.01)
    with jax.enable_x64():
        params, state, mu, nu = p, tx.init(p), 0, 0
        for g in gradients:
            updates, state = tx.update(g, state, params)
            params = optax.apply_updates(params, updates)
            mu, nu = 0.9 * mu + 0.1 * g, 0.999 * nu + 0.001 * g**2
            p = p - 0.1 * (mu / (np.sqrt(nu) + 1e-6) + 0.01 * p)
            np.testing.assert_allclose(params, p, rtol=1e-9)
