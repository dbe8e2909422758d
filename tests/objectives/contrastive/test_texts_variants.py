"""configs/contrastive_texts.py: each variant builds, its ops give what its objective reads, one step is finite."""

import jax
import numpy as np
import pytest

from configs import contrastive_texts
from tests.support.models import initial
from vlm_jax import config, models, objectives
from vlm_jax.data import loader, tokenizers
from vlm_jax.errors import UserError


@pytest.mark.parametrize("name", contrastive_texts.METHODS)
def test_variants_run(name):
    settings = config.plain(contrastive_texts.get_config(f"{name}-smoke"))
    model, tokenizer = models.build(settings["model"]), tokenizers.build("emoji")
    objective = objectives.build(settings["objective"], model, tokenizer=tokenizer)
    data = settings["data"] | {"uri": settings["data"]["uri"] + "&examples=64"}
    batch = next(loader.train_loader(**data, batch_size=4, tokenizer=tokenizer))
    params = initial(model, *objectives.model_inputs(batch, model))

    def step(params):
        made, state = objectives.make(objective, model, params, batch, jax.random.key(0))
        return objectives.value(objective, model, made, batch, jax.random.key(1), state=state)

    shapes = jax.eval_shape(step, params)
    assert shapes[0].shape == () and settings["duration"] == "40 steps"
    assert all(np.isfinite(array).all() for array in batch.values())


def test_what_does_not_exist_is_named():
    with pytest.raises(UserError, match="there is no variant `negatives` of this config; expected one of: hard_"):
        contrastive_texts.get_config("negatives")
    with pytest.raises(UserError, match="there is no variant `huge` of this config"):
        contrastive_texts.get_config("hard_negatives-huge")
