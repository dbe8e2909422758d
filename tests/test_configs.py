"""Shipped experiments, of every family: they build the program that `train` would compile, of the released size."""

import importlib

import numpy as np
import pytest

from vlm_jax import config, models
from vlm_jax.data import ops, tokenizers
from vlm_jax.params import optim, sharding
from vlm_jax.plan.train_step import example_of
from vlm_jax.run.program import build_program

MILLIONS = {  # parameters, of what its authors released; None of what nobody did
    "clip": {"B/32": 151.3, "B/16": 149.6, "L/14": 427.6, "smoke": None},
    "siglip": {"B/16": 203.2, "So400m/14": 877.4, "smoke": None},
    "cap": {"B/16": None, "smoke": None},
    "cappa": {"L/14": None},
    "filip": {"B/32": None, "smoke": None},
    "coca": {"B/32": 253.6, "smoke": None},
    "ul2": {"base": 247.6, "20b": None, "prefix-base": None, "smoke": None, "prefix-tiny": None},
    "ul2_cap": {"B/16": None, "smoke": None},
    "lit": {"B/16": None, "L/16-Uu": None, "tiny-LU": None, "select-Lu": None, "tiny-uu": None, "smoke": None},
}
EXPERIMENTS = [
    (name, variant, millions) for name, variants in MILLIONS.items() for variant, millions in variants.items()
]


@pytest.mark.parametrize(("name", "variant", "millions"), EXPERIMENTS)
def test_builds(name, variant, millions):
    settings = config.plain(importlib.import_module(f"configs.{name}").get_config(variant))
    if settings["tokenizer"] == "emoji":
        ops.parse(settings["data"]["ops"], tokenizers.build("emoji"))
    example = example_of(settings["data"]["ops"])
    if settings["data"]["uri"].startswith("precomputed:"):
        example["image"] = np.zeros((1, 1280), np.float32)
    sections = {key: settings[key] for key in ("model", "objective", "optimizer")}
    steps = lambda length: optim.duration_to_steps(length, 256, 10**6, 10**6)
    program = build_program(
        example, sharding.make_mesh(fsdp=8), steps, **sections,
        partition=sharding.RULES, accumulate=1, ema=None, seed=0,
    )  # fmt: skip
    if millions:
        assert models.count(program.abstract_state.params) == pytest.approx(millions * 1e6, rel=0.005)
