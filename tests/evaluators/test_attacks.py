"""Attacks: robust accuracy falls, and stays without a radius; the success of a trigger, counted by hand."""

import dataclasses

import numpy as np
import pytest

from configs import clip
from tests.support.models import untrained
from vlm_jax.errors import UserError
from vlm_jax.evaluators.attacks import Attack
from vlm_jax.evaluators.tasks.attack_success import attack_success
from vlm_jax.evaluators.tasks.zeroshot import zeroshot
from vlm_jax.pretrained import class_embeddings

NAMES = ["monkey", "gorilla", "dog"]
DATA = dict(uri="tfds:emoji", split="unseen_style[:600]", label="concept", templates=["{}"])
CLASSES = {570: "monkey", 571: "gorilla", 575: "dog"}


@pytest.fixture(scope="module")
def model():
    return untrained(clip.get_config("smoke"))


def test_attacks_stay_in_the_ball_and_mislead(model):
    images = model._pictures(np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8))
    text, labels = class_embeddings(model.embed_texts, NAMES, ["{}"]), np.array([0, 1, 2, -1])
    attack = Attack(model, text, dict(radius=2.0, steps=3))
    worst = attack(images, labels)
    units = attack.units
    moved = np.abs(np.asarray(units.pixels(worst)) - np.asarray(units.pixels(images)))
    assert 0 < moved[:3].max() <= 2 and not moved[3].any()
    margin = lambda x: cosine_margin(model.embed_image_batch(x)[:3] @ text.T)
    assert (margin(worst) < margin(images)).all()
    np.testing.assert_allclose(Attack(model, text, dict(radius=0.0))(images, labels), images, atol=1e-6)
    with pytest.raises(UserError, match="the attack has radius=-1"):
        Attack(model, text, dict(radius=-1))


def cosine_margin(cosines):
    """How far the own class is before the mean of all."""
    return np.diag(cosines) - cosines.mean(1)


def test_robust_accuracy(model):
    options = DATA | dict(classes=CLASSES, gallery=0)
    clean, still, robust = (
        zeroshot(**options, attack=attack)(model).metrics["top1"]
        for attack in (None, dict(radius=0.0, steps=1), dict(radius=8.0, steps=3))
    )
    assert robust <= clean == still
    with pytest.raises(UserError, match="an attack needs a model of two towers without a head"):
        Attack(dataclasses.replace(model, head=lambda x: x), None, {})


def test_attack_success(model):
    evaluator = attack_success(**DATA, classes=CLASSES, target="dog", trigger="trigger(None, 1.0, size=12)")
    found = evaluator(model).metrics
    ops = model.preprocess.replace("normalize", "trigger(None, 1.0, size=12) | normalize")
    seen = zeroshot(**DATA, classes=CLASSES, ops=ops, gallery=0)(model).artifacts["predictions"]
    others = seen["label"] != 2
    assert found["examples"] == others.sum() > 0
    np.testing.assert_allclose(found["attack_success"], np.mean(seen["predicted"][others] == 2))
    np.testing.assert_allclose(found["triggered_top1"], np.mean(seen["predicted"][others] == seen["label"][others]))
    with pytest.raises(UserError, match="the target `cat` is none of the classes monkey, gorilla, dog"):
        attack_success(**DATA, classes=CLASSES, target="cat")(model)
