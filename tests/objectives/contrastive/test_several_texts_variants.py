"""configs/several_texts.py: each variant builds, its ops give what its objective reads."""

import jax
import pytest

from configs import several_texts
from tests.support.models import initial
from vlm_jax import config, models, objectives
from vlm_jax.data import loader, tokenizers
from vlm_jax.errors import UserError


@pytest.mark.parametrize("name", several_texts.METHODS)
def test_variants_build(name):
    settings = config.plain(several_texts.get_config(f"{name}-smoke"))
    model, tokenizer = models.build(settings["model"]), tokenizers.build(settings["tokenizer"])
    objective = objectives.build(settings["objective"], model, tokenizer=tokenizer)
    batch = next(loader.train_loader(**settings["data"], batch_size=2, tokenizer=tokenizer))
    params = initial(model, *objectives.model_inputs(batch, model))

    make = lambda params: objectives.make(objective, model, params, batch, jax.random.key(0))  # runs all terms
    assert jax.eval_shape(make, params)[0].keys() >= params.keys() and settings["duration"] == "40 steps"


def test_what_does_not_exist_is_named():
    with pytest.raises(UserError, match="there is no variant `dream` of this config; expected one of: several_texts"):
        several_texts.get_config("dream")
    with pytest.raises(UserError, match="there is no variant `huge` of this config"):
        several_texts.get_config("grouping-huge")
