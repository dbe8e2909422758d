"""Low-rank updates with single scalars beside them: by hand in float64, folded, and nothing at the beginning."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.few_shot import GIVEN, clip_like
from tests.support.models import run
from vlm_jax.adapt.recipe import tree
from vlm_jax.models import insertion
from vlm_jax.models.insertions.low_rank import LowRank
from vlm_jax.models.insertions.sparse import LowRankSparse
from vlm_jax.params.table import map_with_name, named_leaves


@pytest.fixture(scope="module")
def base():
    return clip_like(scan=True)


def begun(base, module):
    model = insertion.inserted(base.model, module)
    return model, insertion.begin(jax.random.key(0), model, base.params, *GIVEN)


def moved(name, leaf):
    draw = np.random.default_rng(len(name)).standard_normal(leaf.shape) * 0.3
    if name.endswith("inserted_s"):
        draw = np.where(np.abs(draw) > 0.5, draw, 0)
    return leaf + jnp.asarray(draw, leaf.dtype) if "inserted_" in name else leaf


def test_equation_in_float64():
    """h = x W + c + (alpha / r) x (a b + s)."""
    rng = np.random.default_rng(0)
    x, kernel, bias, a, b, s = (rng.normal(size=n) for n in ((3, 5), (5, 4), 4, (5, 2), (2, 4), (5, 4)))
    params = dict(kernel=kernel, bias=bias, inserted_a=a, inserted_b=b, inserted_s=np.where(s > 1, s, 0))
    with jax.enable_x64():
        layer = insertion.inserted(nn.Dense(4, param_dtype=jnp.float64), LowRankSparse("", 2, 6.0))
        found = layer.apply({"params": params}, x)
    np.testing.assert_allclose(found, x @ (kernel + 3 * (a @ b + params["inserted_s"])) + bias, rtol=1e-12)


def test_begins_as_nothing_and_folds(base):
    model, params = begun(base, LowRankSparse(r".*/(query|value|fc1)", 2, 4.0))
    images, texts = jax.random.normal(jax.random.key(1), (2, 8, 8, 3)), jnp.arange(16).reshape(2, 8)
    embed = lambda model, params: run(model, params, images, texts)
    got, want = embed(model, params), embed(base.model, base.params)
    np.testing.assert_array_equal(got.image, want.image)
    np.testing.assert_array_equal(got.text, want.text)
    trained = map_with_name(moved, params)
    got, want = embed(base.model, insertion.merge(trained, model.insertions)), embed(model, trained)
    np.testing.assert_allclose(got.image, want.image, rtol=0, atol=1e-6)
    np.testing.assert_allclose(got.text, want.text, rtol=0, atol=1e-6)


def test_without_scalars_it_is_low_rank(base):
    """s = 0 gives the values of the same a and b alone, bit for bit."""
    fields = (r".*/(query|value)", 2, 4.0)
    (model, params), (plain, low_rank) = begun(base, LowRankSparse(*fields)), begun(base, LowRank(*fields))
    assert not any(np.any(leaf) for name, leaf in insertion.new_leaves(params).items() if name.endswith("inserted_s"))
    low_rank = map_with_name(moved, low_rank)
    params = tree(named_leaves(params) | named_leaves(low_rank))
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    np.testing.assert_array_equal(run(model, params, images, None).image, run(plain, low_rank, images, None).image)
