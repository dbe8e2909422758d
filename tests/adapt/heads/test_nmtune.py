"""NMTune: its regularizers by loops in float64, and the head that it trains."""

import jax
import numpy as np

from vlm_jax.adapt.heads.nmtune import nmtune, regularizers


def test_regularizers_by_hand():
    rng = np.random.default_rng(0)
    f, z = rng.normal(size=(7, 4)), rng.normal(size=(7, 4))
    consistency = np.mean(
        [np.sum((a / np.linalg.norm(a) - b / np.linalg.norm(b)) ** 2) for a, b in zip(f, z, strict=True)]
    )
    covariance = sum(np.cov(z.T)[i, j] ** 2 for i in range(4) for j in range(4) if i != j) / 4
    singular = np.sqrt(np.linalg.eigvalsh(z.T @ z))
    with jax.enable_x64():
        found = jax.jit(regularizers)(f, z)
        same = jax.jit(regularizers)(f, 3 * f)
    np.testing.assert_allclose(found, [consistency, covariance, -singular.max() / singular.sum()], rtol=1e-9)
    np.testing.assert_allclose(same[0], 0, atol=1e-12)


def test_it_learns_and_keeps_directions():
    """Two classes apart; a large weight keeps Z nearer to the features' directions than weight 0."""
    rng, labels = np.random.default_rng(1), np.arange(40) % 2
    x = rng.normal(size=(40, 6)) + 2 * np.where(labels, 1, -1)[:, None] * np.eye(6)[0]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    options = dict(steps=150, batch_size=20, learning_rate=1e-2)
    plain, held = (nmtune(x, labels, np.eye(2, 6), 1.0, weight=weight, **options) for weight in (0.0, 1.0))
    assert all(np.mean(head(x).argmax(1) == labels) > 0.9 for head in (plain, held))
    away = lambda head: float(regularizers(x.astype(np.float32), head.features(x.astype(np.float32)))[0])
    assert away(held) < 0.5 * away(plain)
