"""AdaLink: embedded patches and tokens by loops in float64, and blocks that stay as they are."""

import jax
import numpy as np
import pytest

from tests.support.few_shot import moved, params_with, pictures, tuned
from vlm_jax.adapt.modules.adapter import adalink
from vlm_jax.errors import UserError
from vlm_jax.models import insertion
from vlm_jax.models.insertions.adapter import Adapter
from vlm_jax.models.layers import Dense
from vlm_jax.params.table import map_with_name


def test_only_what_embeds_changes(base):
    adapted = tuned(base, adalink(base.model, rank=2), pictures())
    places = ("image/patch_embed", "text/token_embed")
    assert moved(base, adapted) == {f"{place}/inserted_{part}" for place in places for part in ("down", "up")}
    alone = params_with(base, adalink(base.model, where="text/token_embed"))
    assert {name for name in alone if "inserted_" in name} == {f"{places[1]}/inserted_{p}" for p in ("down", "up")}


def test_the_residual_is_linear():
    """x + sum_r u_r (d_r . x), token by token; bit for bit x while U is 0."""
    with jax.enable_x64(True):
        rng, plain = np.random.default_rng(0), Dense(6, dtype="float64", param_dtype="float64")
        x = rng.normal(size=(2, 3, 5))
        params = plain.init(jax.random.key(0), x)["params"]
        model = insertion.inserted(plain, Adapter("", 2, activation="none", bias=False))
        begun = insertion.begin(jax.random.key(1), model, params, x)
        h = np.asarray(plain.apply({"params": params}, x))
        np.testing.assert_array_equal(model.apply({"params": begun}, x), h)
        down, up = rng.normal(size=(6, 2)), rng.normal(size=(2, 6))
        given = map_with_name(lambda name, leaf: {"inserted_down": down, "inserted_up": up}.get(name, leaf), begun)
        got = model.apply({"params": given}, x)
    want = h.copy()
    for place in np.ndindex(2, 3):
        for r in range(2):
            want[place] += up[r] * sum(down[i, r] * h[place][i] for i in range(6))
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_a_model_without_such_a_layer_is_named(base):
    with pytest.raises(UserError, match="changes nothing: its `where` matches no module of the model"):
        tuned(base, adalink(base.model, where="image/stem"), pictures())
