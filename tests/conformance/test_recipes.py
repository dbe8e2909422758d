"""What every recipe has to do: it builds the program that `train` compiles, of the released size."""

import jax
import numpy as np
import pytest

from vlm_jax import catalogue, config, models
from vlm_jax.command import configs
from vlm_jax.data import mixture, ops, tokenizers
from vlm_jax.errors import UserError
from vlm_jax.params import optim, sharding
from vlm_jax.plan.train_step import examples_of
from vlm_jax.run import stages
from vlm_jax.run.program import build_program
from vlm_jax.zoo.load import load

MILLIONS = {  # parameters, of what its authors released; None of what nobody did
    "clip": {"B/32": 151.3, "B/16": 149.6, "L/14": 427.6, "base": None, "base_multilingual": None},
    "siglip": {"B/16": 203.2, "So400m/14": 877.4, "base": None},
    "siglip2": {"L/16-256": None, "base": None},
    "cap": {"B/16": None},
    "cappa": {"L/14": None, "base": None},
    "filip": {"B/32": None},
    "coca": {"B/32": 253.6},
    "ul2": {"base": 247.6, "20b": None, "prefix-base": None, "prefix-tiny": None},
    "prefix_lm": {"base": None},
    "ul2_cap": {"B/16": None},
    "genlip": {"base": None},
    "clip_rocket": {"strong-byol-smoke": None},
    "dino": {"base": None, "byol-smoke": None},
    "lit": {"B/16": None, "L/16-Uu": None, "tiny-LU": None, "select-Lu": None, "tiny-uu": None},
}
TOWERS = {  # millions of parameters of image towers in their papers, to three digits or two; without GenLIP's gates
    ("openvision2", "L/14"): 304, ("openvision2", "H/14"): 632, ("genlip", "g/16"): 1100, ("aimv2", "L/14"): 309,
    ("aimv2", "3B/14"): 2700,
}  # fmt: skip
RECIPES = catalogue.of("recipes")
EXPERIMENTS = [
    (name, variant, millions) for name in RECIPES for variant, millions in ({"": None} | MILLIONS.get(name, {})).items()
]


@pytest.mark.parametrize(("name", "variant", "millions"), EXPERIMENTS)
def test_builds(name, variant, millions):
    settings = config.plain(RECIPES[name].load()(*filter(None, [variant])))
    if "stages" in settings:
        settings = stages.changed(settings, len(settings["stages"]))
    sources = list(settings["data"].get("sources", {"": settings["data"]}).values())
    if settings["tokenizer"] == "emoji":
        for source in sources:
            ops.parse(source["ops"], tokenizers.build("emoji"))
    example = examples_of(settings["data"])
    if sources[0]["uri"].startswith("precomputed:"):
        example["image"] = np.zeros((1, 1280), np.float32)
    sections = {key: settings[key] for key in ("model", "objective", "optimizer")}
    steps = lambda length: optim.duration_to_steps(length, 256, 10**6, 10**6)
    program = build_program(
        example, mixture.sizes(settings["data"].get("sources"), 256), sharding.make_mesh(fsdp=8), steps, **sections,
        partition=sharding.RULES, accumulate=1, ema=None, seed=0, load=load,
    )  # fmt: skip
    if millions:
        assert models.count(program.abstract_state.params) == pytest.approx(millions * 1e6, rel=0.005)


@pytest.mark.parametrize(("name", "variant"), TOWERS)
def test_image_towers_have_the_published_size(name, variant):
    section = config.plain(RECIPES[name].load()(variant))["model"]
    tower = models.build(
        section | {"image": section["image"] | {"posemb": "none", "attn_gate": False, "image_size": 224}}
    ).image
    shapes = jax.eval_shape(tower.init, jax.random.key(0), np.zeros((1, 224, 224, 3), np.float32))
    assert models.count(shapes) == pytest.approx(TOWERS[name, variant] * 1e6, rel=0.05)


@pytest.mark.parametrize("name", RECIPES)
def test_a_variant_that_does_not_exist_is_named(name):
    with pytest.raises(UserError, match="nonsense") as error:
        RECIPES[name].load()("nonsense")
    assert "\n" not in str(error.value)


def test_every_file_of_configs_that_runs_is_declared():
    assert list(RECIPES) == configs.names()
