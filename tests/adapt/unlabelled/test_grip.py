"""GRIP: which pictures get which label at each iteration and in each setting, its loss, and its limits."""

import jax
import numpy as np
import pytest

from tests.support.few_shot import NAMES, Said, few_shot_task, loss_of, unit_rows
from vlm_jax.adapt.methods import fit
from vlm_jax.adapt.prompts.coop import coop
from vlm_jax.adapt.recipe import Extended
from vlm_jax.adapt.task import logits_of
from vlm_jax.adapt.tune import tune
from vlm_jax.adapt.unlabelled import grip as module
from vlm_jax.adapt.unlabelled.pseudo_labels import top_of_each_class
from vlm_jax.adapt.unlabelled.transport import EMBEDDINGS
from vlm_jax.errors import UserError
from vlm_jax.objectives import Term

TRAINING = dict(steps=2, batch_size=4, learning_rate=1e-2)


@pytest.fixture
def task(base, pictures):
    return few_shot_task(base, pictures)


@pytest.fixture
def tuned(base, monkeypatch):
    """What `tune` is asked for, in order; it returns the base model."""
    calls = []

    def record(model, recipe, images, labels, names, **options):
        calls.append(dict(options, recipe=recipe, labels=labels))
        return model

    monkeypatch.setattr(module, "tune", record)
    return calls


def test_without_weight_it_is_the_prompt(base, task):
    found = fit("grip")(base, *task, weight=0.0, **TRAINING)
    wanted = fit("coop")(base, *task, **TRAINING)
    jax.tree.map(np.testing.assert_array_equal, found.params, wanted.params)


def test_one_iteration_trains_on_zero_shot_pseudo_labels(base, task):
    shots, _, about = task
    found = fit("grip")(base, *task, labelled=False, iterations=1, **TRAINING)
    rows, labels = top_of_each_class(about.pool.features @ about.text.T * 9, 2)
    labels = {"label": labels, "weight": np.ones(6, np.float32)}
    recipe = Extended(coop(base.model), (Term("own", EMBEDDINGS, module.pseudo_labelled),), names_classes=False)
    given = shots.images, np.zeros_like(shots.labels), NAMES  # labels are not read
    wanted = tune(base, recipe, *given, pool=about.pool.images[rows], beside=labels, **TRAINING)
    jax.tree.map(np.testing.assert_array_equal, found.params, wanted.params)


def test_the_number_of_pseudo_labels_grows(base, task, tuned):
    about = task[2]
    fit("grip")(base, *task, iterations=3, k=1, **TRAINING)
    logits = logits_of(base, base, about.pool, NAMES)
    assert len(tuned) == 3 and len({id(call["recipe"]) for call in tuned}) == 1  # compiled once
    for i, call in enumerate(tuned, 1):
        rows, labels = top_of_each_class(logits, i)
        np.testing.assert_array_equal(call["pool"], about.pool.images[rows])
        np.testing.assert_array_equal(call["beside"]["label"], labels)
        np.testing.assert_allclose(call["beside"]["weight"], 9 / (3 * i), rtol=1e-6)
        assert call["recipe"].names_classes and "begin" not in call  # prompts begin anew


def test_settings(base, task, tuned):
    """Semi-supervised: all classes; transductive: those without a label; unsupervised: no label trains."""
    shots, validation, about = task
    seen = shots._replace(**{name: x[shots.labels < 2] for name, x in shots._asdict().items()})
    fit("grip")(base, *task, iterations=2, **TRAINING)
    fit("grip")(base, seen, validation, about, iterations=2, **TRAINING)
    fit("grip")(base, *task, labelled=False, iterations=2, **TRAINING)
    labels = [call["beside"]["label"].tolist() for call in tuned]
    assert labels == [[0, 1, 2], [0, 0, 1, 1, 2, 2], [2] * 3, [2] * 6, [0, 1, 2], [0, 0, 1, 1, 2, 2]]
    assert [call["recipe"].names_classes for call in tuned] == [True] * 4 + [False] * 2
    weights = [call["beside"]["weight"][0] for call in tuned]
    np.testing.assert_allclose(weights, [9 / 3, 9 / 6, 6 / 3, 6 / 6, 1, 1], rtol=1e-6)


def test_the_loss_by_hand():
    images, texts, labels, weight = unit_rows(0, 5, 4), unit_rows(1, 3, 4), np.array([0, 2, -1, 1, 1]), 0.6
    term = Term("pseudo", EMBEDDINGS, module.pseudo_labelled)
    said = {"pool": Said(image_embedding=images), "classes": Said(text_embedding=texts)}
    rows = {"pool": {"label": labels, "weight": np.full(5, weight)}, "classes": {}}
    losses = []
    for i in np.flatnonzero(labels >= 0):
        e = np.exp(10 * images[i] @ texts.T)
        losses.append(-np.log(e[labels[i]] / e.sum()))
    np.testing.assert_allclose(loss_of(term, said, rows), weight * np.mean(losses), rtol=1e-6)
    rows["pool"].pop("weight")
    np.testing.assert_allclose(loss_of(term, said, rows), np.mean(losses), rtol=1e-6)


def test_what_is_wrong_is_named(base, task):
    shots, validation, about = task
    for options, message in (
        (dict(k=0), r"grip\.k is 0; expected 1 or more"),
        (dict(iterations=0), r"grip\.iterations is 0; expected 1 or more"),
        (dict(prompt="texts"), "prompt of grip is `texts`; expected one of: text, image, both; did you mean `text`"),
        (dict(labelled=False, weight=0.0), "weight is 0 without labelled pictures, so that nothing trains"),
    ):
        with pytest.raises(UserError, match=message):
            module.grip(base.model, **options)
    with pytest.raises(UserError, match=r"grip learns from pictures without labels; give a pool \(--pool=64\)"):
        fit("grip")(base, shots, validation, about._replace(pool=None))
    labelled = about._replace(pool=about.pool._replace(labels=np.array([0, -1, 1, -1, -1, -1])))
    with pytest.raises(UserError, match="the pool of grip has 2 labels, which no method may see; give labels of -1"):
        fit("grip")(base, shots, validation, labelled)
    with pytest.raises(UserError, match="`label` beside the pool has 1 rows; expected one for each of its pictures"):
        tune(base, coop(base.model), shots.images, shots.labels, NAMES, pool=shots.images, beside={"label": [1]})
