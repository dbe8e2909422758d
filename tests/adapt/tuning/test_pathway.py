"""Multimodal Pathway: which kernels stand beside which, what trains, and that they fold into the tower's own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vlm_jax
from tests.support.few_shot import GIVEN, moved, pictures, tuned
from vlm_jax import models
from vlm_jax.adapt.tuning.pathway import m2pt
from vlm_jax.errors import UserError
from vlm_jax.models import insertion
from vlm_jax.models.insertions.auxiliary import Auxiliary
from vlm_jax.params.table import named_leaves
from vlm_jax.zoo import model_init


@pytest.fixture(scope="module")
def other(base, tmp_path_factory):
    """The spec of a model whose kernels are twice those of the base."""
    folder = tmp_path_factory.mktemp("m2pt") / "other"
    twice = dataclasses.replace(base, params=jax.tree.map(lambda leaf: 2 * leaf, base.params))
    vlm_jax.save_pretrained(twice, folder)
    return str(folder)


def test_kernels_of_the_same_layer_stand_beside(base, other):
    """In a scan as in a loop, zeros in a fourth block; each block folds by its own share."""
    found = {}
    for scan in (True, False):
        section = {side: {**fields, "scan": scan} for side, fields in base.config["model"].items()}
        section["image"]["depth"] = 4
        model = insertion.inserted(models.build(section), Auxiliary())
        shapes = insertion.new_leaves(jax.eval_shape(model.init, jax.random.key(0), *GIVEN)["params"])
        where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where) for name, x in shapes.items()}
        found[scan] = model_init.read(dict(auxiliary=f"{other}:text"), shapes)
    texts = named_leaves(base.params)
    assert len(found[True]) == 6 and len(found[False]) == 24
    for name, kernel in found[True].items():
        ours = name.replace("image/", "text/").replace("inserted_auxiliary", "kernel")
        np.testing.assert_array_equal(kernel[:3], 2 * texts[ours])
        assert not np.any(kernel[3])
        for i in range(4):
            np.testing.assert_array_equal(found[False][name.replace("blocks", f"blocks_{i}")], kernel[i])
    new = {"scale": jnp.array([0.5, -1.0]), "auxiliary": jnp.arange(12.0).reshape(2, 2, 3)}
    kernel = np.ones((2, 2, 3))
    want = [kernel[0] + 0.5 * new["auxiliary"][0], kernel[1] - new["auxiliary"][1]]
    np.testing.assert_array_equal(Auxiliary().merged(jnp.asarray(kernel), new), want)


def test_it_trains_and_folds(base, other):
    """The result is plain, and computes what it did before folding. Frozen kernels stay; shares and tower train."""
    recipe = m2pt(base.model, auxiliary=f"{other}:text", frozen=True)
    unfolded, given = tuned(base, dataclasses.replace(recipe, finish=None), pictures()), pictures()[0]
    texts, changed = named_leaves(base.params), moved(base, unfolded)
    assert {"image/blocks/mlp/fc1/kernel", "image/pos_embed"} < changed
    assert all(name.startswith("image/") for name in changed)
    for place, new in insertion.by_place(unfolded.params).items():
        assert np.abs(new["scale"]).min() > 0
        np.testing.assert_array_equal(new["auxiliary"], 2 * texts[place.replace("image/", "text/") + "/kernel"])
    plain = recipe.finish(base, unfolded)
    assert plain.model == base.model and named_leaves(plain.params).keys() == texts.keys()
    np.testing.assert_allclose(plain.embed_image_batch(given), unfolded.embed_image_batch(given), atol=1e-6)


def test_what_does_not_fit_is_named(base, other):
    with pytest.raises(UserError, match="tower of m2pt is `audio`"):
        m2pt(base.model, auxiliary=other, tower="audio")
    with pytest.raises(UserError, match="the model has no place for it; add dict"):
        model_init.read_auxiliary(other, named_leaves(base.params))
    with pytest.raises(UserError, match=r"part `encoder` of .* does not fit.*\n *no tensor for"):
        tuned(base, m2pt(base.model, auxiliary=f"{other}:encoder"), pictures())
