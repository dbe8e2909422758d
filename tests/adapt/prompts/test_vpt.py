"""Prompts of the first blocks."""

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.models import insertion
from vlm_jax.models.insertions.prompts import Prompt


def test_prompts_of_the_first_blocks_go_on_through_the_others(base):
    """The rows of later blocks are of no account."""
    images, texts = jnp.ones((2, 8, 8, 3)), jnp.full((2, 8), 5)
    model = insertion.inserted(base.model, Prompt(length=2, depth=2))
    params = insertion.begin(jax.random.key(1), model, base.params, images, texts)
    run = jax.jit(lambda params: model.apply({"params": params}, images, None).image)
    before = run(params)
    rows = params["image"]["blocks"]["inserted_prompt"]
    change = lambda rows: (
        params | {"image": params["image"] | {"blocks": params["image"]["blocks"] | {"inserted_prompt": rows}}}
    )
    np.testing.assert_array_equal(run(change(rows.at[2].add(1))), before)
    assert not np.array_equal(run(change(rows.at[1].add(1))), before)
