"""Plans: the memory of the program that trains, by kind, and what is wrong in words."""

import jax
import numpy as np
import pytest

from configs import clip, ul2
from vlm_jax import models, plan
from vlm_jax.errors import UserError


@pytest.fixture(scope="module")
def planned():
    settings = clip.get_config("smoke")
    settings.mesh.fsdp = 4
    return plan.plan(settings, jax.devices(), hbm=2**30)


def test_memory_by_kind(planned):
    """Parameters over fsdp = 4 but for small ones; two moments of AdamW or one of Muon; pictures of 8 examples."""
    section = clip.get_config("smoke").model.to_dict()
    inputs = np.zeros((1, 32, 32, 3), np.float32), np.zeros((1, 8), np.int32)
    shapes = jax.eval_shape(models.build(section).init, jax.random.key(0), *inputs)["params"]
    whole = 4 * models.count(shapes)
    assert planned.parameters * 4 == whole
    assert whole / 4 < planned.memory["parameters"] < whole / 3
    assert planned.memory["parameters"] < planned.memory["optimizer"] < 2.5 * planned.memory["parameters"]
    assert planned.memory["batch"] == 64 // 8 * (32 * 32 * 3 * 4 + 8 * 4 + 4)
    assert planned.memory["temporaries"] > planned.memory["batch"]
    assert planned.mesh == dict(data=2, fsdp=4, tensor=1) and planned.flops > 0


def test_it_fits_or_it_does_not(planned):
    assert planned.fits and plan.text(planned).endswith("it fits")
    small = planned._replace(hbm=2**20)
    assert not small.fits and "it does not fit" in plan.text(small)


def test_examples_are_as_the_ops_make_them():
    example = plan.example_of(ul2.get_config("base").data.ops)
    assert {name: (array.shape, array.dtype) for name, array in example.items()} == dict(
        input_ids=((1, 512), np.int32), token_ids=((1, 512), np.int32), denoiser=((1,), np.int32)
    )
    example = plan.example_of(clip.get_config("B/32").data.ops)
    assert example["image"].shape == (1, 224, 224, 3) and example["token_ids"].shape == (1, 77)
    with pytest.raises(UserError, match="should end with keep"):
        plan.example_of("decode | resize(8)")


def test_what_is_wrong_is_named():
    with pytest.raises(UserError, match=r"--topology's chip is `v9`; expected one of: v4, v5e"):
        plan.slice_of("v9:2x2")
    with pytest.raises(UserError, match=r"config\.batch_size 10 cannot be split over 8 devices"):
        settings = clip.get_config("smoke")
        settings.batch_size = 10
        plan.plan(settings, jax.devices(), hbm=2**30)
