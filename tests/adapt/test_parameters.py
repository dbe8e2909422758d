"""What trains of the model itself."""

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
