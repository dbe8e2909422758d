"""POUF's losses against loops, in float64, and in their limits; nothing of it reads a label."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.few_shot import Said, loss_of, unit_rows
from vlm_jax.adapt.recipe import Masked
from vlm_jax.adapt.unlabelled.transport import mutual_information, pouf, transport_cost
from vlm_jax.errors import UserError

SCALE = 7.0
IMAGES, TEXTS = unit_rows(0, 5, 4), unit_rows(1, 3, 4)


def by_hand(cosines):
    """(transport cost, mutual information), sum by sum."""
    e = np.exp(SCALE * cosines)
    there = np.mean([sum(e[i, c] / e[i].sum() * (1 - cosines[i, c]) for c in range(3)) for i in range(5)])
    back = np.mean([sum(e[i, c] / e[:, c].sum() * (1 - cosines[i, c]) for i in range(5)) for c in range(3)])
    p = e / e.sum(1, keepdims=True)
    entropy = lambda q: -sum(x * np.log(x) for x in q)
    return there + back, entropy(p.mean(0)) - np.mean([entropy(row) for row in p])


def test_losses_by_hand():
    terms = {term.name: term for term in pouf(None, transport=0.7, information=0.4).terms}
    said = {"pool": Said(image_embedding=IMAGES), "classes": Said(text_embedding=TEXTS)}
    rows = {"pool": {}, "classes": {}}  # no label
    found = [loss_of(terms[name], said, rows, scale=SCALE) for name in ("transport", "information")]
    with jax.enable_x64():
        own = float(transport_cost(jnp.asarray(IMAGES @ TEXTS.T), SCALE))
    np.testing.assert_allclose(own, by_hand(IMAGES @ TEXTS.T)[0], rtol=1e-9)
    np.testing.assert_allclose(found, by_hand(IMAGES @ TEXTS.T), rtol=1e-6)
    assert [terms[name].weight for name in terms] == [0.7, -0.4]
    assert not pouf(None).names_classes


def test_limits():
    """A certain, even assignment has all the information, and costs the distance to the nearest only."""
    with jax.enable_x64():
        even = jnp.eye(3)[jnp.array([0, 1, 2, 0, 1, 2])]
        np.testing.assert_allclose(mutual_information(even, 1e4), np.log(3), rtol=1e-12)
        assert float(transport_cost(even, 1e4)) == 0.0
        np.testing.assert_allclose(mutual_information(jnp.zeros((4, 3)), 9.0), 0, atol=1e-12)
        cosines = jnp.asarray(IMAGES @ TEXTS.T)
        nearest = np.mean(1 - cosines.max(1)) + np.mean(1 - cosines.max(0))
        np.testing.assert_allclose(transport_cost(cosines, 1e5), nearest, rtol=1e-9)


def test_options():
    assert pouf(None, tunes="model").recipe == Masked(((".*", True),))
    assert [term.name for term in pouf(None, information=0.0).terms] == ["transport"]
    with pytest.raises(UserError, match="tunes of pouf is `prompts`; expected one of: prompt, model"):
        pouf(None, tunes="prompts")
    with pytest.raises(UserError, match="transport and information are 0; one of them has to train"):
        pouf(None, transport=0.0, information=0.0)
