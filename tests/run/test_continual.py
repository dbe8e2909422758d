"""configs/continual.py: the stages of each variant build programs whose states follow each other."""

import functools
import json

import pytest

from configs import continual
from vlm_jax import config
from vlm_jax.data import tokenizers
from vlm_jax.data.emoji.splits import TRAIN_STYLES
from vlm_jax.errors import UserError
from vlm_jax.params import optim, sharding
from vlm_jax.plan.train_step import example_of
from vlm_jax.run import stages
from vlm_jax.run.program import build_program

TOTAL = 40


@functools.cache
def state_of(sections):
    """The abstract state of a stage, built once for stages that share these sections, as JSON."""
    steps = functools.partial(optim.duration_to_steps, batch_size=64, examples_per_epoch=1000, total_steps=TOTAL)
    ops, own = json.loads(sections)
    program = build_program(
        example_of(ops), 64, sharding.make_mesh(), steps, **own, partition=sharding.RULES, accumulate=1, ema=None,
        seed=0, tokenizer=tokenizers.build("emoji"), first=1,
    )  # fmt: skip
    return program.abstract_state


@pytest.mark.parametrize("name", continual.METHODS)
def test_variants_build(name):
    settings = config.plain(continual.get_config(f"{name}-smoke"))
    states, styles = [], []
    for stage in stages.read(settings, TOTAL):
        new = stage.settings["data"]["sources"]["new"]
        sections = {key: stage.settings[key] for key in ("model", "objective", "optimizer")}
        states.append(state_of(json.dumps([new["ops"], sections])))
        styles += new["where"]["style"]
        stages.check(states[max(len(states) - 2, 0)], states[-1], stage)
    assert styles == list(TRAIN_STYLES[:2]) and set(styles) == set(settings["evals"])


def test_a_memory_holds_each_earlier_style():
    settings = config.plain(continual.get_config("replay"))
    parts = [stage.settings["data"]["sources"] for stage in stages.read(settings, 1150)]
    assert [len(sources) for sources in parts] == [1, 2, 3, 4, 5]
    for sources in parts[1:]:
        shares = [source.get("weight", 1.0) for source in sources.values()]
        assert sum(shares[1:]) / sum(shares) == pytest.approx(0.25)
        assert {source.get("limit") for name, source in sources.items() if name != "new"} == {128}


@pytest.mark.parametrize("variant", ["lfw", "lwf-huge"])
def test_variants_that_do_not_exist_are_named(variant):
    with pytest.raises(UserError, match=f"there is no variant `{variant}` of this config; expected"):
        continual.get_config(variant)
