"""Prefixes from a network: in numpy, stacked and not; a captioner writes with them as it scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.models import SIZES, initial
from vlm_jax import models
from vlm_jax.adapt.prompts.prefix import prefix_network
from vlm_jax.adapt.recipe import tree
from vlm_jax.models import insertion
from vlm_jax.models.generate import Special, log_likelihood, sample
from vlm_jax.params.table import named_leaves

P, H, HEAD, DEPTH = 3, 2, 4, 2


@pytest.mark.parametrize("scan", [True, False])
def test_the_network(scan):
    """relu(E K + a) V + b of a stack, cut into keys and values of the blocks."""
    recipe = prefix_network(None, length=P, hidden=5)
    places = ["blocks"] if scan else ["blocks_0", "blocks_1"]
    shape = (DEPTH,) * scan + (P, H, HEAD)
    leaves = {
        f"{stack}/{place}/attn/inserted_{kind}": jnp.zeros(shape)
        for stack in ("decoder", "image") for place in places for kind in ("key", "value")
    }  # fmt: skip
    own = recipe.begin(jax.random.key(0), None, leaves)
    own = {name: x + 0.1 * jax.random.normal(jax.random.key(len(name)), x.shape) for name, x in own.items()}
    width, total = H * HEAD, 2 * DEPTH * H * HEAD
    count = P * width + width * 5 + 5 + 5 * total + total
    assert sum(x.size for x in own.values()) == 2 * count
    placed = recipe.combine(own, leaves)
    assert {name: x.shape for name, x in placed.items()} == {name: x.shape for name, x in leaves.items()}
    for stack in ("decoder", "image"):
        given = lambda name, stack=stack: np.asarray(own[f"{stack}/{name}"], np.float64)
        hidden = np.maximum(given("embedding") @ given("fc1/kernel") + given("fc1/bias"), 0)
        rows = hidden @ given("fc2/kernel") + given("fc2/bias")
        parts = np.concatenate([
            np.asarray(placed[name]).reshape(-1, P, width) for name in sorted(leaves) if name.startswith(stack)
        ])  # fmt: skip
        np.testing.assert_allclose(parts, np.stack(np.split(rows, 2 * DEPTH, axis=1)), rtol=1e-5, atol=1e-6)


def test_a_captioner_writes_as_it_scores():
    """With prefixes in both stacks, the likelihood of a greedy text, by a cache, is that of the whole text at once."""
    decoder = dict(SIZES, vocab_size=16, length=6)
    model = models.build(dict(name="captioner", image=dict(SIZES, patch=8), decoder=decoder))
    images, texts = jax.random.normal(jax.random.key(0), (3, 16, 16, 3)), jnp.ones((3, 6), int)
    recipe = prefix_network(model, length=2, hidden=4)
    prefixed = insertion.inserted(model, *recipe.insertions(model, 0))
    leaves = named_leaves(insertion.begin(jax.random.key(1), prefixed, initial(model, images, texts), images, texts))
    own = recipe.begin(jax.random.key(2), prefixed, leaves)
    own = {name: leaf + 0.5 * jax.random.normal(jax.random.key(len(name)), leaf.shape) for name, leaf in own.items()}
    placed = recipe.combine(own, leaves)
    assert placed.keys() == insertion.new_leaves(leaves).keys()
    assert {name.split("/")[0] for name in placed} == {"image", "decoder"}
    params = tree(leaves | placed)
    special = Special(pad=15)  # never chosen here
    found = sample(prefixed, params, images, length=6, greedy=True, special=special)
    assert not np.any(found.token_ids == special.pad)
    whole = log_likelihood(prefixed, params, images, found.token_ids, pad_id=special.pad, eos_id=special.end)
    np.testing.assert_allclose(found.log_likelihood, whole, rtol=1e-5, atol=1e-5)
    plain = log_likelihood(model, params, images, found.token_ids, pad_id=special.pad, eos_id=special.end)
    assert np.abs(plain - whole).min() > 1e-2
