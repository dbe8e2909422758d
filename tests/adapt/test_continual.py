"""LAE: two tasks one after the other, the slow expert and the ensemble against loops."""

import numpy as np
import pytest

from tests.support.few_shot import NAMES, clip_like, pictures
from vlm_jax.adapt.continual import lae
from vlm_jax.adapt.modules.lora import lora
from vlm_jax.adapt.tuning.classifier import tes
from vlm_jax.errors import UserError
from vlm_jax.models.insertion import new_leaves


@pytest.fixture(scope="module")
def given():
    """(base, recipe, two tasks of two names each)"""
    base, (images, labels) = clip_like(scan=True), pictures()
    task = lambda a, b: (images[(labels == a) | (labels == b)], np.tile([0, 1], 4), [NAMES[a], NAMES[b]])
    return base, lora(base.model, rank=2), [task(0, 1), task(0, 2)]


def run(given, decay, tasks=slice(None)):
    base, recipe, all_tasks = given
    return lae(base, recipe, all_tasks[tasks], decay=decay, steps=1, batch_size=4, learning_rate=1e-2)


def test_the_offline_module_follows_and_both_vote(given):
    """With one step a task: offline = d first + (1 - d) second."""
    first, both = run(given, 0.75, slice(1)), run(given, 0.75)
    images, _ = pictures()
    once, online, offline = (new_leaves(model.params) for model in (first.online, both.online, both.offline))
    for name, leaf in offline.items():
        wanted = 0.75 * np.float64(once[name]) + 0.25 * np.float64(online[name])
        np.testing.assert_allclose(leaf, wanted, rtol=1e-6, atol=1e-8)
    assert any(np.any(leaf != online[name]) for name, leaf in offline.items())
    assert both.online.classes == NAMES
    found, logits = both.probabilities(images), [np.float64(model.class_logits(images, NAMES)) for model in both]
    for i in range(len(images)):
        for c in range(len(NAMES)):
            each = [np.exp(z[i, c]) / sum(np.exp(z[i, k]) for k in range(len(NAMES))) for z in logits]
            assert found[i, c] == pytest.approx(max(each), rel=1e-5)
    held = new_leaves(run(given, 1.0).offline.params)
    for name, leaf in once.items():  # a decay of 1 never leaves the first task
        np.testing.assert_array_equal(held[name], leaf)


def test_mistakes_are_named(given):
    with pytest.raises(UserError, match="lae: decay is 2; expected 0 to 1"):
        run(given, 2)
    base, _, tasks = given
    with pytest.raises(UserError, match="lae: the recipe's classifier knows one task's classes alone"):
        lae(base, tes(base.model), tasks[:1], steps=1, batch_size=4, learning_rate=1e-2)
    with pytest.raises(UserError, match="lae: there are no tasks"):
        run(given, 0.5, slice(0))
