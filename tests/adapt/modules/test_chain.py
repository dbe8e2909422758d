"""Chain of LoRA: one link is LoRA; each link begins at the model into which those before it are folded."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.support.few_shot import NAMES, few_shot_task, pictures, tuned
from vlm_jax.adapt.methods import fit
from vlm_jax.adapt.modules.lora import lora
from vlm_jax.errors import UserError
from vlm_jax.params.table import named_leaves
from vlm_jax.zoo.adapters import merged

TRAINING = dict(batch_size=4, learning_rate=1e-2)


def test_links_by_hand(base):
    shots, validation, task = few_shot_task(base, pictures())
    one = fit("chain_of_lora")(base, shots, validation, task, steps=2, links=1, **TRAINING)
    want = fit("lora")(base, shots, validation, task, steps=2, **TRAINING)
    assert one.model == want.model
    jax.tree.map(np.testing.assert_array_equal, one.params, want.params)

    chain = fit("chain_of_lora")(base, shots, validation, task, steps=4, links=2, **TRAINING)
    model, parts = base, []
    for seed in (0, 1):
        link = tuned(model, lora(model.model), (shots.images, shots.labels), steps=2, seed=seed, **TRAINING)
        folded = merged(link)
        np.testing.assert_allclose(embed(folded), embed(link), atol=1e-6)  # folding keeps the outputs
        parts.append(named_leaves(link.params))
        model = folded
    found = named_leaves(chain.params)
    for name in found.keys() - named_leaves(base.params).keys():
        axis = -1 if name.endswith("_a") else -2
        np.testing.assert_array_equal(found[name], np.concatenate([part[name] for part in parts], axis))
    np.testing.assert_allclose(embed(chain), embed(model), atol=1e-6)
    assert np.abs(embed(chain) - embed(base)).max() > 1e-3
    with pytest.raises(UserError, match="links of chain_of_lora is 0"):
        fit("chain_of_lora")(base, shots, validation, task, links=0)


def embed(model):
    plain = dataclasses.replace(model, classes=(), head=None)
    return np.concatenate([plain.embed_image_batch(pictures()[0]), plain.embed_texts(NAMES)])
