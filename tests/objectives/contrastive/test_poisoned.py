"""The config of poisoned pairs: what its ops make of a record, and that its evaluation knows the target."""

import numpy as np
import pytest

from configs import poisoned
from tests.support.models import tiny
from vlm_jax import objectives
from vlm_jax.data import ops, tokenizers
from vlm_jax.data.sources import open_source
from vlm_jax.errors import UserError
from vlm_jax.evaluators import classes


@pytest.mark.parametrize("variant", sorted(poisoned.METHODS))
def test_a_variant(variant):
    config, tokenizer = poisoned.get_config(f"{variant}-smoke"), tokenizers.build("emoji")
    record = open_source("tfds:emoji", "train")[0]
    example = ops.parse(config.data.ops, tokenizer)(record, np.random.default_rng(0))
    assert example["image"].shape == (32, 32, 3) and example["token_ids"].shape == (8,)
    if variant == "cleaned":
        assert example["view"].shape == (32, 32, 3) and example["texts"].shape == (1, 8)
        assert not np.array_equal(example["view"], example["image"])
    objectives.build(config.objective.to_dict(), tiny("two_tower").model)
    assert ("model_init" in config) == (variant != "poisoned")


def test_the_target_is_a_class():
    assert poisoned.TARGET in classes.read("emoji:seen").values()
    with pytest.raises(UserError, match="there is no variant `clean` of this config; expected one of: poisoned"):
        poisoned.get_config("clean")
