import jax
import numpy as np
import pytest

from vlm_jax.errors import UserError
from vlm_jax.objectives.combinations import project


def gradients(sign):
    """Two trees whose product has the sign."""
    rng = np.random.default_rng(0)
    g = {"a": rng.normal(size=(3, 2)), "b": rng.normal(size=4)}
    h = jax.tree.map(lambda x: sign * x + rng.normal(size=x.shape) / 10, g)
    return {"kept": g, "other": h}


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_what_works_against_the_other_term_is_lost(strength):
    with jax.enable_x64(True):
        given = gradients(-1)
        found = project(keep="kept", against="other", strength=strength)(given, None)
        g, h, got = (np.concatenate([tree["a"].ravel(), tree["b"]]) for tree in (*given.values(), found))
        np.testing.assert_allclose(got, g - strength * (g @ h) / (h @ h) * h, rtol=1e-12)
        if strength == 1:
            np.testing.assert_allclose(got @ h, 0, atol=1e-12)


def test_without_conflict_nothing_changes():
    given = gradients(1)
    found = project(keep="kept", against="other")(given, None)
    jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(np.float32, given["kept"]))


def test_a_term_that_is_not_there_is_named():
    with pytest.raises(UserError, match="there is no term `nothing`; the terms: kept, other"):
        project(keep="kept", against="nothing")(gradients(1), None)
