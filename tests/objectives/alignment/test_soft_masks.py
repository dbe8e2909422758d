"""Soft masks against Grad-CAM by differences, in fp64; without strength, pictures are whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.towers import Towers
from vlm_jax import objectives
from vlm_jax.errors import UserError
from vlm_jax.objectives.alignment.soft_masks import FusionWithMap
from vlm_jax.objectives.outputs import Outputs
from vlm_jax.objectives.term import Context

RNG = np.random.default_rng(0)
FUSION = dict(width=6, depth=1, heads=2, mlp_dim=8, dtype="float64")
ROWS = {"image": RNG.normal(size=(2, 4, 4, 3)), "token_ids": np.array([[3, 4, 0], [5, 0, 0]])}


@pytest.fixture(scope="module")
def ready():
    """(objective of a strength, model, parameters with the term's own)"""
    with jax.enable_x64(True):
        build = lambda strength: objectives.build(dict(name="soft_masks", fusion=FUSION, strength=strength), Towers())
        shapes = jax.eval_shape(Towers().init, jax.random.key(0), ROWS["image"], ROWS["token_ids"])["params"]
        make = lambda params: objectives.make(build(1.0), Towers(), params, ROWS, jax.random.key(1))[0]
        shapes = jax.eval_shape(make, shapes)
        yield build, jax.tree.map(lambda x: np.random.default_rng(x.size).normal(size=x.shape), shapes)


def test_masks(ready):
    build, params = ready
    with jax.enable_x64(True):
        outputs = lambda: Outputs(Towers(), params, ROWS).of("soft_masks")  # without keys: the first word
        logits = lambda strength: jax.jit(
            lambda: build(strength).terms[0].features["batch"](outputs(), Context(0, True))
        )()
        found = outputs()
        text, image, mask = found["text_tokens"], found["image_tokens"], ROWS["token_ids"] != 0
        fusion = FusionWithMap(**FUSION, pool="none", cross="after")
        own = {"params": params["objective"]["soft_masks"]["fusion"]}
        run = jax.jit(lambda image, more: fusion.apply(own, text, image, mask, more))
        attention = run(image, 0.0)[1]
        np.testing.assert_allclose(np.sum(attention, axis=-1), 1, rtol=1e-12)
        cam = np.zeros((2, 4))
        for head in range(2):
            for patch in range(4):
                step = np.zeros(attention.shape)
                step[:, head, 0, patch] = 1e-6
                slope = (run(image, step)[0] - run(image, -step)[0])[:, 1] / 2e-6
                cam[:, patch] += attention[:, head, 0, patch] * np.maximum(slope, 0) / 2
        assert np.any(cam > 0)
        low, high = cam.min(1, keepdims=True), cam.max(1, keepdims=True)
        fading = (cam - low) / np.where(high > low, high - low, 1)
        want = run(image * (1 - 0.7 * fading[..., None]), 0.0)[0]
        got = logits(0.7)
        np.testing.assert_allclose(got, want, rtol=1e-6)
        assert np.any(np.abs(got - run(image, 0.0)[0]) > 1e-5)
        np.testing.assert_allclose(logits(0.0), run(image, 0.0)[0], rtol=1e-13)


def test_the_loss_has_both_parts():
    logits = {"pairs": RNG.normal(size=(6, 2)), "batch": RNG.normal(size=(2, 2))}
    match = np.array([1, 1, 0, 0, 0, 0])
    (term,) = objectives.build(dict(name="soft_masks", fusion=FUSION, masked=0.5), Towers()).terms
    with jax.enable_x64(True):
        loss, _ = term.loss(None, logits, {"pairs": {"match": jnp.asarray(match)}}, None)
    entropy = lambda x, y: np.mean([np.log(np.sum(np.exp(row))) - row[k] for row, k in zip(x, y, strict=True)])
    np.testing.assert_allclose(
        loss, entropy(logits["pairs"], match) + 0.5 * entropy(logits["batch"], [1, 1]), rtol=1e-12
    )


def test_a_strength_that_does_not_exist_is_named():
    with pytest.raises(UserError, match="strength is 2; expected 0 to 1"):
        objectives.build(dict(name="soft_masks", strength=2), Towers())
