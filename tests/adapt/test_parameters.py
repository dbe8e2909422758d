"""What trains of the model itself."""

import jax.numpy as jnp
import numpy as np

from tests.support.few_shot import few_shot_task, moved, tuned
from vlm_jax.adapt.methods import fit
from vlm_jax.adapt.recipe import Masked


def test_last_1_leaves_the_other_layers(base, pictures):
    adapted = tuned(base, Masked("last_1"), pictures)
    for tower in ("image", "text"):
        old, new = (p.params[tower]["blocks"]["mlp"]["fc1"]["kernel"] for p in (base, adapted))
        assert np.array_equal(old[:-1], new[:-1]) and not np.array_equal(old[-1], new[-1])


def test_prolip_trains_the_projection_alone(base, pictures):
    adapted = fit("prolip")(base, *few_shot_task(base, pictures))
    assert moved(base, adapted) == {"image/head/kernel"}


def test_single_scalars_and_rows_are_own_parameters():
    leaves = {"a/w": jnp.arange(6.0).reshape(2, 3), "b": jnp.arange(4.0), "c": jnp.ones(2)}
    scalars = np.array([[True, False, False], [False, False, True]])
    recipe = Masked((("a/w", scalars), ("b", np.array([False, True, True, False])), (".*", False)))
    own = recipe.begin(None, None, leaves)
    assert {name: value.tolist() for name, value in own.items()} == {"a/w": [0, 5], "b": [1, 2]}
    changed = recipe.combine({name: value + 10 for name, value in own.items()}, leaves)
    np.testing.assert_array_equal(changed["a/w"], leaves["a/w"] + 10 * scalars)
    np.testing.assert_array_equal(changed["b"], [0, 11, 12, 3])
