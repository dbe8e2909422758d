"""COSINE against loops, in float64: sharpening, confidence, pairs; when pseudo-labels are refreshed; its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from tests.support.few_shot import Said, unit_rows
from vlm_jax.adapt.unlabelled import self_training
from vlm_jax.adapt.unlabelled.self_training import certainty, contrastive_self_training, pair_margin, sharpened
from vlm_jax.errors import UserError

B, C, SCALE = 6, 3, 6.0
ROWS = {who: (unit_rows(i, B, 5), unit_rows(i + 2, C, 5)) for i, who in enumerate(("own", "pseudo"))}


def value(options, rows=ROWS):
    """The loss after the warm-up, float64."""
    term = contrastive_self_training(None, **options).terms[0]
    assert term.name == "self_training"
    with jax.enable_x64():
        split = lambda i: {who: jnp.asarray(pair[i]) for who, pair in rows.items()}
        features = {"pool": split(0), "classes": split(1)}
        return float(term.loss(Said(scale=SCALE), features, {"pool": {}, "classes": {}}, None)[0])


def softmax(who, rows=ROWS):
    return scipy.special.softmax(SCALE * rows[who][0] @ rows[who][1].T, axis=1)


def by_hand(power, confidence, contrast, margin, uniform):
    p, q, x = softmax("own"), softmax("pseudo"), ROWS["own"][0]
    y = np.array([[q[i, c] ** power / q[:, c].sum() for c in range(C)] for i in range(B)])
    y /= y.sum(1, keepdims=True)
    weight = [1 - sum(-y[i, c] * np.log(y[i, c]) for c in range(C)) / np.log(C) for i in range(B)]
    kept = [i for i in range(B) if weight[i] >= confidence]
    assert 1 < len(kept) < B
    fit = np.mean([weight[i] * sum(y[i, c] * np.log(y[i, c] / p[i, c]) for c in range(C)) for i in kept])
    over = np.mean([sum(np.log(1 / C / p[i, c]) / C for c in range(C)) for i in kept])
    pairs = []
    for i in kept:
        for j in kept:
            if i != j:
                d = 1 - x[i] @ x[j]
                pairs.append(d**2 if y[i].argmax() == y[j].argmax() else max(0, margin - d) ** 2)
    return fit + contrast * np.mean(pairs) + uniform * over


def test_the_loss_by_hand():
    options = dict(power=2.0, confidence=0.8, contrast=0.7, margin=0.9, uniform=0.2)
    np.testing.assert_allclose(value(options), by_hand(**options), rtol=1e-6)
    parts = [value(options | {name: 0.0}) for name in ("contrast", "uniform")]
    wanted = [by_hand(**options | {name: 0.0}) for name in ("contrast", "uniform")]
    np.testing.assert_allclose(parts, wanted, rtol=1e-6)


def test_certain_pseudo_labels_are_labels():
    """The divergence from one-hot pseudo-labels, at full confidence, is the cross-entropy; other weights are 0 to 1."""
    x = unit_rows(7, C, C)
    rows = {"own": (x, unit_rows(8, C, C)), "pseudo": (1e3 * np.eye(C), np.eye(C))}
    found = value(dict(confidence=1.0, contrast=0.0, uniform=0.0), rows)
    np.testing.assert_allclose(found, -np.log(np.diag(softmax("own", rows))).mean(), rtol=1e-9)
    with jax.enable_x64():
        p = jnp.asarray(softmax("own"))
        np.testing.assert_array_equal(certainty(jnp.array([[0.0, 1.0, 0.0]])), [1.0])
        np.testing.assert_allclose(certainty(jnp.full((1, 3), 1 / 3)), [0.0], atol=1e-12)
        even = p / p.sum(0)
        even /= even.sum(1, keepdims=True)
        np.testing.assert_allclose(sharpened(p, 1.0), even, rtol=1e-12)
        none = pair_margin(jnp.asarray(x), jnp.arange(C), jnp.zeros(C, bool))
        assert float(none) == 0 == value(dict(confidence=1.0))  # nobody is that certain


def test_weak_labels_are_the_zero_shot_names():
    images, texts = ({"own": ROWS["own"][i], "base": ROWS["pseudo"][i]} for i in (0, 1))
    with jax.enable_x64():
        features = {"pool": images, "classes": texts}
        found = float(self_training.weak_labels(Said(scale=SCALE), features, None, None)[0])
    labels = (images["base"] @ texts["base"].T).argmax(1)
    np.testing.assert_allclose(found, -np.log(softmax("own")[np.arange(B), labels]).mean(), rtol=1e-6)


def test_stages_and_refreshes():
    """Weak labels for the warm-up, then self-training; the teacher is the model at the end of each period."""
    recipe = contrastive_self_training(None, warmup=3, period=2)
    late, weak = (np.array([float(term.weight(step)) for step in range(8)]) for term in recipe.terms)
    assert late.tolist() == [0, 0, 0, 1, 1, 1, 1, 1] == (1 - weak).tolist()
    keeps = [float(recipe.teachers["pseudo"].decay(step)) for step in range(8)]
    assert keeps == [0, 0, 0, 1, 0, 1, 0, 1]  # after the step: the teacher of step 3 is the model before it
    (only,) = contrastive_self_training(None, warmup=0).terms
    assert only.weight == 1.0 and not recipe.names_classes
    with pytest.raises(UserError, match=r"contrastive_self_training\.period is 0; expected 1 or more"):
        contrastive_self_training(None, period=0)
    with pytest.raises(UserError, match="confidence of contrastive_self_training is 2; expected 0 to 1"):
        contrastive_self_training(None, confidence=2)
