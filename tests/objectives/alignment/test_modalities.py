"""Classifiers of pictures with texts: losses and weights by loops in float64, and what is one head alone."""

from typing import ClassVar

import flax.linen as nn
import jax
import numpy as np
import pytest
import scipy.special

from vlm_jax import objectives
from vlm_jax.errors import UserError
from vlm_jax.objectives import Objective, Teacher
from vlm_jax.objectives.alignment.modalities import HEADS, blend, blended, modality_subsets

B, C, D = 8, 3, 4


class Nothing(nn.Module):
    """Embeddings are in the rows."""

    outputs: ClassVar = {}


def rows(seed=0):
    rng = np.random.default_rng(seed)
    batch = {f"{name}_embedding": rng.normal(size=(B, D)) for name in HEADS[:2]}
    return batch | {"concept": np.append(rng.integers(0, C, B - 1), -1), "held": np.arange(B) % 3 == 0}


def begun(term, teachers=()):
    """(step, parameters, memory); step(params, state, batch, number=0) -> (metrics, memory after)."""
    objective = Objective((term,), teachers=dict.fromkeys(teachers, Teacher(0.9)))
    make = lambda batch: objectives.make(objective, Nothing(), {}, batch, jax.random.key(0))
    params, state = jax.jit(make)(rows())

    @jax.jit
    def step(params, state, batch, number=0):
        given = objective, Nothing(), params, batch, None
        _, metrics, _, features = objectives.value_and_grad(*given, state=state, step=number)
        return metrics, objectives.update(objective, state, params, features, None, number)

    return step, jax.tree.map(np.asarray, params), state


def entropies(params, batch, counts):
    """Cross-entropy of each head over the rows that count."""
    x = {name: batch[f"{name}_embedding"] for name in HEADS[:2]}
    x["both"] = np.concatenate([x["image"], x["text"]], axis=1)
    found = []
    for name in HEADS:
        log_p = scipy.special.log_softmax(x[name] @ params[name]["kernel"] + params[name]["bias"], axis=1)
        found.append(
            -np.mean([log_p[i, batch["concept"][i]] for i in np.flatnonzero(counts & (batch["concept"] >= 0))])
        )
    return np.array(found)


def test_blended_by_hand():
    """Two super-epochs of two steps: equal weights, still, then G / O^2 of both."""
    with jax.enable_x64():
        step, params, state = begun(blended(model=None, classes=C, held="held", every=2))
        own, means, weights = params["objective"]["blended"], [], np.full(3, 1 / 3)
        for number in range(5):
            batch = rows(number)
            moved = {"objective": {"blended": jax.tree.map(lambda p, n=number: p * (1 - 0.1 * n), own)}}
            metrics, state = step(moved, state, batch, number)
            train, held = (entropies(moved["objective"]["blended"], batch, c) for c in (~batch["held"], batch["held"]))
            np.testing.assert_allclose(metrics["blended/loss"], weights @ train, rtol=1e-6)
            means.append((train, held))
            if number == 3:
                (t0, h0), (t1, h1) = (np.mean(means[i : i + 2], axis=0) for i in (0, 2))
                ratio = np.maximum(h0 - h1, 0) / ((h1 - t1) - (h0 - t0)) ** 2
                assert ratio.any()
                weights = ratio / ratio.sum()
        np.testing.assert_allclose([metrics[f"blended/weight_{name}"] for name in HEADS], weights, rtol=1e-6)


def test_one_head_alone():
    with jax.enable_x64():
        step, params, _ = begun(blended(model=None, classes=C, weights=(0, 0, 1)))
        found = step(params, None, rows())[0]
    want = entropies(params["objective"]["blended"], rows(), np.ones(B, bool))
    np.testing.assert_allclose(found["blended/loss"], want[2], rtol=1e-9)


def test_without_gain_the_weights_stay():
    losses = lambda *held: {"train": np.zeros(2), "held": np.array(held)}
    still = np.array([0.2, 0.8])
    np.testing.assert_allclose(blend(losses(1.0, 1.0), losses(1.5, 1.0), still), still, rtol=1e-6)
    np.testing.assert_allclose(blend(losses(np.nan, np.nan), losses(0.5, 0.4), still), still, rtol=1e-6)
    np.testing.assert_allclose(blend(losses(1.0, 1.0), losses(0.5, 1.2), still), [1, 0])


def test_subsets_by_hand():
    with jax.enable_x64():
        step, params, _ = begun(modality_subsets(model=None, classes=C, distil=0.7), ["average"])
        other = jax.tree.map(lambda p: p + 0.3 * np.cos(p), params)
        found = step(params, {"terms": {}, "teachers": {"average": other}}, rows())[0]
        alone, _, _ = begun(modality_subsets(model=None, classes=C, distil=0.0))
        bare = alone(params, None, rows())[0]
    batch = rows()
    known, y = batch["concept"] >= 0, np.eye(C)[batch["concept"]]
    image, text = (batch[f"{name}_embedding"] for name in HEADS[:2])

    def log_p(params, image, text):
        head = params["objective"]["modality_subsets"]["head"]
        x = np.concatenate([image, text], axis=1)
        return scipy.special.log_softmax(x @ head["kernel"] + head["bias"], axis=1)[known]

    wanted = log_p(other, image, text)
    entropy, divergence = [], []
    for pair in ((image, 0 * text), (0 * image, text), (image, text)):
        own = log_p(params, *pair)
        entropy.append(-(y[known] * own).sum(1).mean())
        divergence.append((np.exp(wanted) * (wanted - own)).sum(1).mean())
    np.testing.assert_allclose(found["loss"], np.mean(entropy) + 0.7 * np.mean(divergence), rtol=1e-6)
    np.testing.assert_allclose(bare["loss"], np.mean(entropy), rtol=1e-9)


def test_what_is_wrong_is_named():
    for options, message in (
        ({}, "takes `held`, the key of held-out rows, or constant `weights`; give one"),
        ({"weights": (1, 0)}, r"weights is \[1, 0\]; expected a weight of 0 or more for each"),
        ({"held": "held", "every": 0}, "every is 0; expected 1 step or more"),
    ):
        with pytest.raises(UserError, match=message):
            blended(model=None, classes=C, **options)
