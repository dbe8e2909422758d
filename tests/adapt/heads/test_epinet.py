"""The epinet against the formula, in its limits; and its prior: uncertain away from the training pictures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from tests.support.few_shot import unit_rows
from vlm_jax.adapt import heads
from vlm_jax.errors import UserError

SCALE = 5.0
FEATURES, TEXT = unit_rows(0, 12, 6), unit_rows(1, 3, 6)
LABELS = np.arange(12) % 3
SMALL = dict(hidden=8, index=4, samples=16)


def by_hand(network, x, z):
    """sigma(x, z) of one picture and one index, loop by loop."""
    h = np.concatenate([x, z])
    for kernel, bias in ((network.first, network.first_bias), (network.second, network.second_bias)):
        h = np.maximum([sum(h[i] * kernel[i, j] for i in range(len(h))) + bias[j] for j in range(len(bias))], 0)
    out = (h @ network.last + network.last_bias).reshape(-1, len(z))
    return np.array([sum(out[c, i] * z[i] for i in range(len(z))) for c in range(len(out))])


@pytest.fixture(scope="module")
def trained():
    return heads.epinet(FEATURES, LABELS, TEXT, SCALE, steps=300, learning_rate=3e-2, prior=2.0, **SMALL)


def test_logits_by_hand(trained):
    with jax.enable_x64():
        exact = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), trained)
        found = np.stack([exact.logits(jnp.asarray(FEATURES), z) for z in exact.indices[:3]])
    for z, logits in zip(trained.indices.astype(np.float64), found, strict=False):
        for x, own in zip(FEATURES, logits, strict=True):
            spread = by_hand(trained.learned, x, z) + 2.0 * by_hand(trained.fixed, x, z)
            np.testing.assert_allclose(own, x @ trained.weights + trained.bias + spread, rtol=1e-6, atol=1e-6)
    p = scipy.special.softmax(trained.samples(FEATURES), axis=2)
    np.testing.assert_allclose(np.exp(trained(FEATURES)), p.mean(0), rtol=1e-9)
    np.testing.assert_allclose(trained.uncertainty(FEATURES), p.var(0).sum(1), rtol=1e-9)


def test_without_steps_and_prior_it_is_zero_shot():
    """Each index gives the zero-shot logits, bit for bit: the learned network begins at 0."""
    head = heads.epinet(FEATURES, LABELS, TEXT, SCALE, steps=0, prior=0.0, **SMALL)
    wanted = np.asarray(jnp.matmul(FEATURES.astype(np.float32), np.float32(SCALE * TEXT.T), precision="highest"))
    for logits in head.samples(FEATURES):
        np.testing.assert_allclose(logits, wanted, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(logits, head.samples(FEATURES)[0])
    zero_shot = scipy.special.log_softmax(heads.zero_shot(TEXT, SCALE)(FEATURES), axis=1)
    np.testing.assert_allclose(head(FEATURES), zero_shot, atol=1e-5)
    assert (head.uncertainty(FEATURES) < 1e-12).all()


def test_training_moves_all_but_the_prior(trained):
    begun = heads.epinet(FEATURES, LABELS, TEXT, SCALE, steps=0, prior=2.0, **SMALL)
    jax.tree.map(np.testing.assert_array_equal, trained.fixed, begun.fixed)
    assert not np.array_equal(trained.weights, begun.weights) and np.any(trained.learned.last)
    assert (trained(FEATURES).argmax(1) == LABELS).all()
    known, elsewhere = trained.uncertainty(FEATURES), trained.uncertainty(unit_rows(5, 64, 6))
    assert known.max() < 0.1 and elsewhere.mean() > 3 * known.mean()
    assert begun.uncertainty(FEATURES).mean() > 3 * known.mean()


def test_features_reach_the_epinet_without_gradient(trained):
    slope = jax.jacobian(lambda x: trained.logits(x[None], trained.indices[0])[0])(jnp.asarray(FEATURES[0]))
    np.testing.assert_allclose(slope, trained.weights.T, rtol=1e-6)


def test_what_is_wrong_is_named():
    for name in ("hidden", "index", "draws", "samples"):
        with pytest.raises(UserError, match=rf"epinet\.{name} is 0; expected 1 or more"):
            heads.epinet(FEATURES, LABELS, TEXT, SCALE, **{name: 0})
    with pytest.raises(UserError, match=r"epinet\.prior is -1; expected 0 or more"):
        heads.epinet(FEATURES, LABELS, TEXT, SCALE, prior=-1)
