"""MaPLe against its equation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.few_shot import D, clip_like
from vlm_jax.adapt.prompts.maple import Coupled
from vlm_jax.models import insertion


@pytest.mark.parametrize("scan", [True, False])
def test_coupled_prompts_are_linear_in_the_texts(scan):
    """V_j = P_j K_j + b_j in the first J blocks, nothing in the others."""
    recipe = Coupled(length=2, depth=2)
    own = {"prompts": (2, 2, D), "kernel": (2, D, D), "bias": (2, D)}
    own = {name: jax.random.normal(jax.random.key(i), shape) for i, (name, shape) in enumerate(own.items())}
    base = clip_like(scan)
    model = insertion.inserted(base.model, *recipe.insertions(base.model, 0))
    given = jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 8), int)
    leaves = insertion.new_leaves(jax.eval_shape(model.init, jax.random.key(0), *given)["params"])
    placed = recipe.combine(own, {name: jnp.ones(leaf.shape) for name, leaf in leaves.items()})
    assert {name: leaf.shape for name, leaf in placed.items()} == {name: leaf.shape for name, leaf in leaves.items()}

    def row(tower, name, i):
        return placed[f"{tower}/blocks/{name}"][i] if scan else placed[f"{tower}/blocks_{i}/{name}"]

    for i in range(2):
        want = own["prompts"][i] @ own["kernel"][i] + own["bias"][i]
        np.testing.assert_allclose(row("image", "inserted_prompt", i), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(row("text", "inserted_context", 1), own["prompts"][1])
    np.testing.assert_array_equal(placed["text/token_embed/inserted_context"], own["prompts"][0])
    assert not np.any(row("image", "inserted_prompt", 2))
