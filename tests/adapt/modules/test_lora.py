"""CoDyRA: the update by loops over ranks, ranks that go to 0, and what is left folded into the kernels."""

import dataclasses

import jax
import numpy as np

from tests.support.few_shot import NAMES, clip_like, pictures
from vlm_jax.adapt.modules.lora import codyra
from vlm_jax.adapt.tune import tune
from vlm_jax.models import insertion
from vlm_jax.models.insertions.low_rank import merge
from vlm_jax.params.table import map_with_name, named_leaves


def embed(model, params=None):
    images, _ = pictures()
    return dataclasses.replace(model, params=model.params if params is None else params).embed_image_batch(images)


def test_ranks_without_importance_are_gone_and_the_others_fold():
    base, (images, labels) = clip_like(scan=True), pictures()
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
