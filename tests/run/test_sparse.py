"""configs/spdf.py: a run begins with the zeros of the drawn mask; the dense stage follows on."""

import functools

import jax
import numpy as np
import pytest

from configs import spdf
from vlm_jax import config
from vlm_jax.data import tokenizers
from vlm_jax.errors import UserError
from vlm_jax.params import masks, optim, sharding
from vlm_jax.params.table import named_leaves
from vlm_jax.plan.train_step import example_of
from vlm_jax.run import stages
from vlm_jax.run.program import build_program


def test_zeros_begin_and_end():
    settings = config.plain(spdf.get_config("75-smoke"))
    steps = functools.partial(optim.duration_to_steps, batch_size=32, examples_per_epoch=1000, total_steps=40)
    read, programs = stages.read(settings, 40), []
    for stage in read:
        sections = {key: stage.settings[key] for key in ("model", "objective", "optimizer")}
        programs.append(
            build_program(
                example_of(stage.settings["data"]["ops"]), 32, sharding.make_mesh(), steps, **sections,
                partition=sharding.RULES, accumulate=1, ema=0.9, seed=0, tokenizer=tokenizers.build("emoji"),
            )
        )  # fmt: skip
    stages.check(programs[0].abstract_state, programs[1].abstract_state, read[1])
    assert "'keywords/de'" in read[1].settings["data"]["ops"] and "'keywords/en'" in read[0].settings["data"]["ops"]
    with jax.set_mesh(programs[0].mesh):
        state = programs[0].init(jax.random.key(0), {})
    zeros = 0
    for name, leaf in named_leaves(state.params).items():
        np.testing.assert_array_equal(leaf, named_leaves(state.ema)[name])
        if "blocks" in name and name.endswith("kernel"):
            np.testing.assert_array_equal(np.asarray(leaf) != 0, masks.drawn(name, leaf.shape, 0.75))
            assert programs[0].groups[name].endswith("75 % zeros") and "zeros" not in programs[1].groups[name]
            zeros += 1
        elif name.endswith("embedding"):
            assert np.all(leaf)
    assert zeros >= 6


def test_variants():
    dense = config.plain(spdf.get_config("0"))["stages"][0]["optimizer"]["params"][0][1]
    assert dense == {"sparse": 0.0}
    for variant in ("100", "75-huge", "half"):
        with pytest.raises(UserError, match=f"there is no variant `{variant}` of this config; expected a percent"):
            spdf.get_config(variant)
