"""Low-rank updates: what they are in their limits; CoDyRA's ranks that go to 0, and what is left, folded."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.support.few_shot import NAMES, pictures, tuned
from vlm_jax.adapt.modules.lora import codyra, dora, lora, lora_plus, rslora
from vlm_jax.adapt.tune import tune
from vlm_jax.errors import UserError
from vlm_jax.models import insertion
from vlm_jax.models.insertion import merge
from vlm_jax.params.table import map_with_name, named_leaves


def same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got.params, want.params)


def test_lora_is_the_limit(base):
    """rsLoRA of a smaller alpha, and LoRA+ of equal rates, bit for bit; b alone learns faster."""
    steps, faster = [], []
    low_rank = tuned(base, lora(base.model, alpha=8), pictures(), after=steps.append)
    same(tuned(base, rslora(base.model, alpha=4), pictures()), low_rank)
    same(tuned(base, lora_plus(base.model, alpha=8, ratio=1.0), pictures()), low_rank)
    tuned(base, lora_plus(base.model, alpha=8, ratio=4.0), pictures(), after=faster.append)
    for name, once in steps[0].items():
        times = 4 if name.endswith("_b") else 1
        np.testing.assert_allclose(faster[0][name], times * once, rtol=1e-5)
    with pytest.raises(UserError, match="ratio of lora_plus is 0; expected above 0"):
        lora_plus(base.model, ratio=0)


def test_dora_keeps_lengths_until_they_train(base):
    """With m = 0, columns of the kernels are as long as before, and turned; trained, they are |W| + m long."""
    trained = tuned(base, dora(base.model), pictures())
    held = map_with_name(lambda name, leaf: 0 * leaf if name.endswith("magnitude") else leaf, trained.params)
    place, length = "image/blocks/attn/value", lambda params: np.linalg.norm(named_leaves(params)[PLACE], axis=-2)
    turned = merge(held, trained.model.insertions)
    assert not np.allclose(named_leaves(turned)[PLACE], named_leaves(base.params)[PLACE], atol=1e-3)
    np.testing.assert_allclose(length(turned), length(base.params), rtol=1e-6)
    magnitude = named_leaves(trained.params)[f"{place}/inserted_magnitude"]
    assert np.abs(magnitude).max() > 1e-3
    longer = length(merge(trained.params, trained.model.insertions))
    np.testing.assert_allclose(longer, length(base.params) + magnitude, rtol=1e-6)


PLACE = "image/blocks/attn/value/kernel"


def embed(model, params=None):
    images, _ = pictures()
    return dataclasses.replace(model, params=model.params if params is None else params).embed_image_batch(images)


def test_ranks_without_importance_are_gone_and_the_others_fold(base):
    images, labels = pictures()
    recipe = codyra(base.model, rank=3, threshold=0.4, begin="50%")
    few = tune(base, recipe, images, labels, NAMES, steps=6, batch_size=4, learning_rate=1e-2)
    leaves, before = named_leaves(few.params), named_leaves(base.params)
    found = np.concatenate([np.ravel(leaf) for name, leaf in leaves.items() if name.endswith("inserted_importance")])
    assert len(found) == 8 * 3 * 3 and 0 < np.sum(found == 0) < len(found)  # places, blocks, ranks
    folded = merge(few.params, few.model.insertions)
    plain = dataclasses.replace(few, model=insertion.removed(few.model), params=folded)
    np.testing.assert_allclose(embed(plain), embed(few), atol=1e-5)
    place = "image/blocks/attn/value"
    a, b, w = (np.asarray(leaves[f"{place}/inserted_{part}"], np.float64) for part in ("a", "b", "importance"))
    for block in range(3):
        kernel = np.asarray(before[f"{place}/kernel"], np.float64)[block]
        for i in range(3):
            kernel = kernel + w[block, i] * np.outer(a[block, :, i], b[block, i])
        np.testing.assert_allclose(named_leaves(folded)[f"{place}/kernel"][block], kernel, rtol=1e-6, atol=1e-6)
    none = map_with_name(lambda name, leaf: 0 * leaf if name.endswith("importance") else leaf, few.params)
    np.testing.assert_array_equal(embed(few, none), embed(base))
    jax.tree.map(np.testing.assert_array_equal, merge(none, few.model.insertions), base.params)
