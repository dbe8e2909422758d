"""TeCoA and SMART: their losses by a loop in float64, and what is the base method exactly."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.few_shot import plain
from vlm_jax.adapt.recipe import Extended, Inserted
from vlm_jax.adapt.tuning.adversarial import smart, tecoa
from vlm_jax.adapt.tuning.classifier import IMAGE
from vlm_jax.errors import UserError
from vlm_jax.models.insertions.prompts import Prompt
from vlm_jax.objectives import Objective, value

B, C, N, D = 3, 4, 2, 5
SCALE = 3.0


class Image(nn.Module):
    """Pictures [B, N, 1, 3] -> embeddings of unit norm [B, D]: patches, their sum, a layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, param_dtype=x.dtype, name="patch_embed")(x[:, :, 0]).sum(1)
        x = nn.Dense(D, use_bias=False, param_dtype=x.dtype, name="head")(x)
        return x / jnp.linalg.norm(x, axis=1, keepdims=True)


class Model(nn.Module):
    """The image tower alone; texts are given."""

    outputs: ClassVar = {"image_embedding": lambda o: o.apply("__call__", o["image"]), "scale": lambda o: SCALE}

    @nn.compact
    def __call__(self, images):
        return Image(name="image")(images)


def given():
    """(model, params, pictures, labels with padding, texts), in float64."""
    rng = np.random.default_rng(0)
    params = {"image": {"patch_embed": {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)}}}
    params["image"]["head"] = {"kernel": rng.normal(size=(4, D))}
    texts = rng.normal(size=(C, D))
    images = rng.integers(0, 256, (B, N, 1, 3)) / 127.5 - 1
    return Model(), params, images, np.array([1, 3, -1]), texts / np.linalg.norm(texts, axis=1, keepdims=True)


def other(params):
    """The parameters of an average."""
    return jax.tree.map(lambda p: p + 0.1 * np.cos(p), params)


def logits_of(params, images, texts, shift=0.0):
    """Logits [B, C] and the gradient of sum(c * logits) by the patches [B, N, 4], as a function of c."""
    image = params["image"]
    z = (images[:, :, 0] @ image["patch_embed"]["kernel"] + image["patch_embed"]["bias"] + shift).sum(1)
    z = z @ image["head"]["kernel"]
    norm = np.linalg.norm(z, axis=1, keepdims=True)
    e = z / norm

    def pull(c):
        g = SCALE * c @ texts
        g = (g - e * (e * g).sum(1, keepdims=True)) / norm @ image["head"]["kernel"].T
        return np.repeat(g[:, None], N, axis=1)

    return SCALE * e @ texts.T, pull


def log_softmax(x):
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def loss(recipe, rng, train=True):
    """The terms' metrics on the pictures."""
    model, params, images, labels, texts = given()
    teachers = {"average": recipe.teachers["average"]} if recipe.teachers else {}
    objective = Objective(recipe.terms, teachers=teachers)
    rows = {"batch": {"image": images, "label": labels}, "classes": {"text_embedding": texts}}
    state = {"terms": {}, "teachers": {"average": other(params)}} if teachers else None
    with jax.enable_x64():
        run = jax.jit(
            lambda params, rows, state: value(objective, model, params, rows, rng, state=state, train=train)[1]
        )
        metrics = run(params, rows, state)
    return {name: float(number) for name, number in metrics.items()}


def test_tecoa_by_hand():
    recipe = tecoa(None, radius=4.0, steps=3, size=1.5)
    base = type("Base", (), {"preprocess": "decode | normalize"})
    _, params, images, labels, texts = given()
    kept, y = labels >= 0, np.eye(C)[labels]
    found = loss(recipe.of_task(base, None, None, None), None)
    pixels = start = np.round((images + 1) * 127.5)
    for _ in range(3):
        logits, pull = logits_of(params, start / 127.5 - 1, texts)
        up = pull((np.exp(log_softmax(logits)) - y) * kept[:, None]) @ params["image"]["patch_embed"]["kernel"].T
        start = np.clip(np.clip(start + 1.5 * np.sign(up)[:, :, None], pixels - 4, pixels + 4), 0, 255)
    log_p = log_softmax(logits_of(params, start / 127.5 - 1, texts)[0])
    np.testing.assert_allclose(found["adversarial/loss"], -(y * log_p).sum(1)[kept].mean(), rtol=1e-6)
    assert 3 <= found["adversarial/moved"] <= 4
    clean = -(y * log_softmax(logits_of(params, images, texts)[0])).sum(1)[kept].mean()
    assert found["adversarial/loss"] > clean


def test_smart_by_hand(monkeypatch):
    recipe, rng = smart(None, radius=0.02, size=0.01, noise=0.005, steps=2), jax.random.key(3)
    _, params, images, labels, texts = given()
    kept = labels >= 0
    draw = np.random.default_rng(5).normal(size=(B, N, 4))
    monkeypatch.setattr(jax.random, "normal", lambda *args: jnp.asarray(draw))
    found = loss(recipe, rng)
    delta, clean = np.clip(0.005 * draw, -0.02, 0.02), log_softmax(logits_of(params, images, texts)[0])
    distance = lambda a, b: ((np.exp(a) - np.exp(b)) * (a - b)).sum(1)
    for _ in range(2):
        logits, pull = logits_of(params, images, texts, delta)
        log_p = log_softmax(logits)
        p, apart = np.exp(log_p), log_p - clean
        g = pull((p * (apart - (p * apart).sum(1, keepdims=True)) + p - np.exp(clean)) * kept[:, None])
        delta = np.clip(delta + 0.01 * g / (np.abs(g).max(-1, keepdims=True) + 1e-12), -0.02, 0.02)
    want = distance(log_softmax(logits_of(params, images, texts, delta)[0]), clean)[kept].mean()
    np.testing.assert_allclose(found["smoothness/loss"], want, rtol=1e-6)
    of_average = log_softmax(logits_of(other(params), images, texts)[0])
    np.testing.assert_allclose(found["proximity/loss"], distance(clean, of_average)[kept].mean(), rtol=1e-6)


def test_limits():
    assert vars(tecoa(None, radius=0.0)) == vars(Extended(IMAGE))
    assert tecoa(None, length=3).recipe == tecoa(None, radius=0.0, length=3).recipe == Inserted((Prompt(length=3),))
    assert plain(smart(None, smoothness=0.0, proximity=0.0))
    with pytest.raises(UserError, match="tecoa has radius -1 and steps 2; expected 0 or more"):
        tecoa(None, radius=-1)
