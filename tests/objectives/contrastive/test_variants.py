"""configs/contrastive.py: each variant builds, and what it names is a method."""

import pytest

from configs import contrastive
from vlm_jax import catalogue, config, models, objectives
from vlm_jax.errors import UserError

FAMILIES = ("terms", "similarities", "penalties", "spaces")


@pytest.mark.parametrize("name", contrastive.METHODS)
def test_variants_build(name):
    settings = config.plain(contrastive.get_config(f"{name}-smoke"))
    model = models.build(settings["model"])
    objective = objectives.build(settings["objective"], model)
    alone = {"boxes": "entailment"} | {term: term for term in ("arc_margin", "neighbours", "moco")}
    main = alone.get(name, "contrastive")
    assert main in [term.name for term in objective.terms]
    assert name in catalogue.of(*FAMILIES) and settings["duration"] == "40 steps"


def test_sizes_that_do_not_exist_are_named():
    with pytest.raises(UserError, match="there is no variant `huge` of this config"):
        contrastive.get_config("mixed-huge")
