"""Tuning with a classifier: losses by a loop in float64, the head of the result, what is the base method exactly."""

from typing import ClassVar

import flax.linen as nn
import jax
import numpy as np
import pytest
import scipy.special

from tests.support.few_shot import NAMES
from vlm_jax import objectives
from vlm_jax.adapt.tuning.classifier import calibrated, dr_tune, lp_ft, tes
from vlm_jax.adapt.tuning.contrastive import clip_cite, flyp
from vlm_jax.errors import UserError
from vlm_jax.objectives import Objective, Teacher
from vlm_jax.pretrained.linear import logistic_regression

B, C, D, SCALE = 5, 3, 4, 3.0
LABELS = np.array([0, 2, 2, -1, 1])


class Nothing(nn.Module):
    """Embeddings are in the rows."""

    outputs: ClassVar = {"scale": lambda o: SCALE}


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def rows():
    rng = np.random.default_rng(0)
    x, base, texts = (unit(rng.normal(size=(n, D))) for n in (B, B, C))
    batch = {"image_embedding": x, "base_embedding": base, "label": LABELS}
    return {"batch": batch, "classes": {"text_embedding": texts, "zero_shot": texts}}


def begun(recipe, given):
    """(objective, parameters of the terms, memory), in float64."""
    base = Teacher(spec="base", model=Nothing(), params={}, inputs={"image_embedding": "base_embedding"})
    objective = Objective(recipe.terms, teachers={"base": base})
    make = lambda given: objectives.make(objective, Nothing(), {}, given, jax.random.key(0), {"base": {}})
    return objective, *jax.jit(make)(given)


def value(objective, params, given, state=None):
    run = lambda *args: objectives.value(objective, Nothing(), *args, None, state=state, frozen={"base": {}})[0]
    return float(jax.jit(run)(params, given))


def entropy(logits, targets, counts):
    return -(targets * scipy.special.log_softmax(logits, axis=1)).sum(1)[counts].mean()


def test_flyp_by_hand():
    given = rows()
    logits = SCALE * given["batch"]["image_embedding"] @ given["classes"]["text_embedding"][LABELS].T
    kept = np.flatnonzero(LABELS >= 0)
    one_way = lambda logits: -np.diag(scipy.special.log_softmax(logits[np.ix_(kept, kept)], axis=1)).mean()
    with jax.enable_x64():
        found = value(Objective(flyp(None).terms), {}, given)
    np.testing.assert_allclose(found, (one_way(logits) + one_way(logits.T)) / 2, rtol=1e-9)


def test_clip_cite_by_hand():
    """All three losses pair by pair, and each alone."""
    given, kept = rows(), np.flatnonzero(LABELS >= 0)
    x, texts = given["batch"]["image_embedding"], given["classes"]["text_embedding"]
    given["classes"]["base_embedding"] = texts  # the teacher's texts are those in the rows
    base = given["batch"]["base_embedding"]
    with jax.enable_x64():
        objective, params, _ = begun(clip_cite(None, contrast=0.6, distil=0.2), given)
        params = jax.tree.map(lambda p: p + 0.1 * np.cos(np.arange(p.size)).reshape(p.shape), params)
        found = value(objective, params, given)
        alone = value(*begun(clip_cite(None, contrast=0.0, distil=0.0), given)[:2], given)
    own = SCALE * x @ unit(np.asarray(params["objective"]["names"]["classes"]["table"])).T
    logits, of_base = SCALE * x @ texts[LABELS].T, SCALE * base @ texts[LABELS].T
    apart = divergence = 0
    for i in kept:
        rest = [j for j in kept if LABELS[j] != LABELS[i] or j == i]
        apart -= logits[i, i] - scipy.special.logsumexp(logits[i, rest])
        apart -= logits[i, i] - scipy.special.logsumexp(logits[rest, i])
        p, q = (scipy.special.softmax(one[i, kept]) for one in (logits, of_base))
        divergence += np.sum(p * np.log(p / q))
    want = entropy(own, np.eye(C)[LABELS], LABELS >= 0) + (0.6 * apart + 0.2 * divergence) / len(kept)
    np.testing.assert_allclose(found, want, rtol=1e-6)
    np.testing.assert_allclose(alone, entropy(SCALE * x @ texts.T, np.eye(C)[LABELS], LABELS >= 0), rtol=1e-6)
    assert clip_cite(None, alpha=1.0).finish is None
    with pytest.raises(UserError, match="alpha of clip_cite is 2; expected 0"):
        clip_cite(None, alpha=2)


def test_tes_by_hand():
    given, counts, y = rows(), LABELS >= 0, np.eye(C)[LABELS]
    x, texts = given["batch"]["image_embedding"], given["classes"]["zero_shot"]
    with jax.enable_x64():
        objective, params, _ = begun(tes(None, soft=0.3, text=0.5, temperature=0.2, hidden=6), given)
        params = jax.tree.map(lambda p: p + 0.1 * np.cos(np.arange(p.size)).reshape(p.shape), params)
        found = value(objective, params, given)
        plain_objective, plain_params, _ = begun(tes(None, soft=0.0, text=0.0), given)
        plain = value(plain_objective, plain_params, given)
    own = jax.tree.map(np.asarray, params["objective"]["head"])
    p = own["projector"]
    z = x @ p["fc1"]["kernel"] + p["fc1"]["bias"]
    z = (z - z.mean(1, keepdims=True)) / np.sqrt(z.var(1, keepdims=True) + 1e-6) * p["norm"]["scale"] + p["norm"][
        "bias"
    ]
    projected = unit(np.maximum(z, 0) @ p["fc2"]["kernel"] + p["fc2"]["bias"])
    of_texts = projected @ texts.T / 0.2
    target = 0.7 * y + 0.3 * scipy.special.softmax(of_texts, axis=1)
    logits = x @ own["head"]["kernel"] + own["head"]["bias"]
    want = entropy(logits, target, counts) + 0.5 * entropy(of_texts, y, counts)
    np.testing.assert_allclose(found, want, rtol=1e-6)
    assert plain_params["objective"]["head"].keys() == {"head"}
    np.testing.assert_allclose(plain, entropy(SCALE * x @ texts.T, y, counts), rtol=1e-9)
    with pytest.raises(UserError, match="soft of tes is 2; expected the share"):
        tes(None, soft=2)


def by_hand(base, own, labels, prototypes):
    """The calibration of DR-Tune, class by class."""
    known = labels >= 0
    x, y = base[known], own[known]
    u, _, vt = np.linalg.svd((x - x.mean(0)).T @ (y - y.mean(0)))
    v = vt.T.copy()
    v[:, -1] *= np.linalg.det(v @ u.T)
    moved = (x - x.mean(0)) @ (v @ u.T).T + y.mean(0)
    for c in range(C):
        of_class = labels[known] == c
        if of_class.any():
            shares = scipy.special.softmax(y[of_class] @ prototypes[c])
            moved[of_class] += shares @ y[of_class] - moved[of_class].mean(0)
    return unit(moved)


def test_calibration_by_hand():
    rng = np.random.default_rng(2)
    base, own, prototypes = (unit(rng.normal(size=(n, D))) for n in (12, 12, C))
    labels = np.append(rng.integers(0, 2, 11), -1)  # nothing of class 2
    with jax.enable_x64():
        run = jax.jit(calibrated, static_argnums=(4, 5))
        found = np.asarray(run(base, own, labels, prototypes))
        turned = own @ np.linalg.qr(rng.normal(size=(D, D)))[0][:, [1, 0, 2, 3]]
        back = run(turned, own, np.arange(12) % C, prototypes, True, False)
        same = run(base, own, labels, prototypes, False, False)
    np.testing.assert_allclose(found[:11], by_hand(base, own, labels, prototypes), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(same, base, atol=1e-7)
    turn = np.linalg.lstsq(turned, own, rcond=None)[0]
    if np.linalg.det(turn) > 0:  # a rotation is undone
        np.testing.assert_allclose(back, own, atol=1e-6)


def test_dr_tune_by_hand():
    """A batch, then the next one beside the queue that holds the first one's embeddings of both models."""
    given, counts, y = rows(), LABELS >= 0, np.eye(C)[LABELS]
    x, base, texts = (
        given["batch"]["image_embedding"],
        given["batch"]["base_embedding"],
        given["classes"]["zero_shot"],
    )
    with jax.enable_x64():
        objective, params, state = begun(dr_tune(None, weight=0.5, queue=7), given)
        first = value(objective, params, given, state)
        features = {"base": base, "own": x, "label": LABELS}
        state = {"terms": {"head": objective.terms[0].update(state["terms"]["head"], {"batch": features}, None)}}
        second = value(objective, params, given, state)
        bare, bare_params, no_state = begun(dr_tune(None, weight=0.0), given)
        without = value(bare, bare_params, given)
    own = entropy(SCALE * x @ texts.T, y, counts)
    np.testing.assert_allclose([first, without], own, rtol=1e-9)
    assert no_state is None
    of_queue = entropy(SCALE * by_hand(base, x, LABELS, texts) @ texts.T, y[counts], np.ones(4, bool))
    np.testing.assert_allclose(second, (4 * own + 0.5 * 4 * of_queue) / (4 + 0.5 * 4), rtol=1e-6)
    np.testing.assert_array_equal(state["terms"]["head"]["label"], [*LABELS, -1, -1])


def test_lp_ft_begins_with_the_probe(base, pictures):
    """The head, before training, is the linear probe of the base model's embeddings."""
    images, labels = pictures
    recipe = lp_ft(base.model, l2=0.5).of_task(base, images, labels, NAMES)
    x = np.float64(base.embed_image_batch(images))
    probe = logistic_regression(x, labels, len(NAMES), 0.5)
    given = {"batch": {"image_embedding": x, "label": labels}, "classes": {"zero_shot": np.eye(3, x.shape[1])}}
    with jax.enable_x64():
        objective, params, _ = begun(recipe, given)
        found = value(objective, params, given)
    np.testing.assert_allclose(params["objective"]["head"]["head"]["kernel"], probe.weights, rtol=1e-9)
    np.testing.assert_allclose(found, entropy(probe(x), np.eye(3)[labels], labels >= 0), rtol=1e-9)
    assert recipe.head == "head" and not recipe.names_classes
