import jax
import numpy as np
import pytest

from vlm_jax.errors import UserError
from vlm_jax.objectives.combinations import harmonise, project


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


def test_other_terms_stay():
    given, third = gradients(-1), gradients(2)["other"]
    alone = project(keep="kept", against="other")(given, None)
    found = project(keep="kept", against="other")(given | {"third": third}, None)
    jax.tree.map(lambda x, y, z: np.testing.assert_allclose(x, y + z, rtol=1e-5, atol=1e-6), found, alone, third)


def test_a_term_that_is_not_there_is_named():
    with pytest.raises(UserError, match="there is no term `nothing`; the terms: kept, other"):
        project(keep="kept", against="nothing")(gradients(1), None)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def by_hand(gradients):
    """The loop of PCGrad in the terms' order."""
    total = 0
    for i, g in enumerate(gradients):
        for j, h in enumerate(gradients):
            if i != j and g @ h < 0:
                g = g - (g @ h) / (h @ h) * h
        total = total + g
    return total


def test_terms_lose_what_works_against_each_other():
    with jax.enable_x64(True):
        given = gradients(-1) | {"third": gradients(1)["other"]}
        found = flat(harmonise()(given, None))
        np.testing.assert_allclose(found, by_hand([flat(g) for g in given.values()]), rtol=1e-9)
        two = gradients(-1)
        both = flat(harmonise()(two, None))
        assert all(both @ flat(g) >= -1e-12 for g in two.values())


def test_batches_that_conflict_count_for_nothing():
    two = gradients(-1)
    g, h = map(flat, two.values())
    cosine = g @ h / np.linalg.norm(g) / np.linalg.norm(h)
    assert cosine < -0.9 and not np.any(flat(harmonise(drop_below=-0.9)(two, None)))
    kept = harmonise(drop_below=cosine - 1e-3)(two, None)
    np.testing.assert_array_equal(flat(kept), flat(harmonise()(two, None)))
    with pytest.raises(UserError, match=r"drop_below is 0.5; expected a cosine from -1"):
        harmonise(drop_below=0.5)


def test_harmony_is_the_sum():
    given = jax.tree.map(np.float32, gradients(1))
    jax.tree.map(np.testing.assert_array_equal, harmonise()(given, None), jax.tree.map(np.add, *given.values()))
