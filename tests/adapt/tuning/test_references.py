"""Full tuning near the base model: the pull and the noise by hand, and what is full tuning exactly."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tests.support.few_shot import plain
from vlm_jax import objectives
from vlm_jax.adapt.recipe import Adapted
from vlm_jax.adapt.tuning import references
from vlm_jax.errors import UserError
from vlm_jax.params.table import named_leaves


def test_limits(base):
    """Weight 0 is full tuning; between base and tuned model, the ends are these, bit for bit."""
    assert plain(references.l2_sp(base.model, weight=0.0)) and plain(references.mixout(base.model, p=0.0))
    other = dataclasses.replace(base, params=jax.tree.map(lambda leaf: leaf + 0.1, base.params))
    for alpha, want in ((0.0, base), (1.0, other)):
        found = references.wise_ft(base.model, alpha=alpha).finish(base, other)
        jax.tree.map(np.testing.assert_array_equal, found.params, want.params)
    with pytest.raises(UserError, match=r"p of mixout is 1.0; expected at least 0 and less than 1"):
        references.mixout(base.model, p=1.0)
    with pytest.raises(UserError, match="alpha of wise_ft is 2; expected 0"):
        references.wise_ft(base.model, alpha=2)


def test_l2_sp_by_hand(base):
    """Value and gradient of weight / 2 |w - w_0|^2."""
    recipe, leaves = references.l2_sp(base.model, weight=0.3), named_leaves(base.params)
    own = {name: leaf + 0.01 for name, leaf in leaves.items()}
    objective = objectives.Objective(recipe.terms)
    batch = {"label": np.zeros(3, int)}
    view = Adapted(base.model, recipe, leaves)
    value, _, gradient, _ = jax.jit(
        lambda own: objectives.value_and_grad(objective, view, own, batch, jax.random.key(0))
    )(own)
    want = 0.15 * sum(np.sum((np.float64(own[name]) - leaves[name]) ** 2) for name in own)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    for name in own:
        np.testing.assert_allclose(gradient[name], 0.3 * (np.float64(own[name]) - leaves[name]), rtol=1e-5, atol=1e-9)


def test_mixout_sees_mixed_parameters(base):
    """A pass in training sees base scalars where the noise says so; the mean over draws is the model."""
    recipe, leaves = references.mixout(base.model, p=0.4), {"head": np.arange(6.0, dtype=np.float32)}
    draw = jax.jit(jax.vmap(lambda rng: recipe.noise(rng, {"head": leaves["head"] + 1}, leaves)["head"]))
    moved = draw(jax.random.split(jax.random.key(0), 2000)) - leaves["head"]
    np.testing.assert_allclose(np.unique(moved.round(3)), [0, 1.667], atol=1e-3)
    np.testing.assert_allclose(moved.mean(), 1, atol=0.03)
    seen = []
    model = SimpleNamespace(apply=lambda variables, rngs: seen.append(variables["params"]["head"]))
    for rngs in (None, {"dropout": jax.random.key(0)}, {"dropout": jax.random.key(1)}):
        Adapted(model, recipe, leaves).apply({"params": {"head": leaves["head"] + 1}}, rngs=rngs)
    np.testing.assert_array_equal(seen[0], leaves["head"] + 1)
    assert not np.array_equal(seen[1], seen[2])
