"""SPIDER's optimizer: against a loop in float64; with importance 1, the inner optimizer."""

import jax
import numpy as np
import optax

from vlm_jax.params import importance, transforms


def score(x):
    if not x.any():
        return np.zeros_like(x)
    size = np.abs(x)
    return 1 / (1 + np.exp(-(size - size.mean()) / size.std(ddof=1)))


def by_hand(begun, total):
    """The loop of the paper over one matrix."""
    a, b = score(begun), score(total)
    r = np.where(b > a, b / np.where(a + b == 0, 1, a + b), 0)
    return np.minimum(1, r / r[r > 0].mean()) if r.any() else r


def layers(tree):
    return enumerate(tree["blocks"]["kernel"])


def test_spider_by_hand():
    rng = np.random.default_rng(0)
    params = {"head": rng.normal(size=(3, 4)), "blocks": {"kernel": rng.normal(size=(2, 3, 4))}, "scale": np.ones(())}
    gradients = [jax.tree.map(lambda p: rng.normal(size=p.shape), params) for _ in range(3)]
    inner, tx = optax.adamw(0.1, weight_decay=0.01), transforms.spider(0.1, 0.01)
    with jax.enable_x64():
        here, state, inner_state, total = params, tx.init(params), inner.init(params), None
        for g in gradients:
            total = g if total is None else jax.tree.map(np.add, total, g)
            step, inner_state = inner.update(g, inner_state, here)
            mask = {
                "head": by_hand(params["head"], total["head"]),
                "blocks": {
                    "kernel": np.stack(list(map(by_hand, params["blocks"]["kernel"], total["blocks"]["kernel"])))
                },
                "scale": np.zeros(()),
            }
            want = jax.tree.map(lambda m, b, p, u: (1 - m) * b + m * (p + u), mask, params, here, step)
            updates, state = tx.update(g, state, here)
            here = optax.apply_updates(here, updates)
            jax.tree.map(lambda got, value: np.testing.assert_allclose(got, value, rtol=1e-9), here, want)
    assert 0 < np.mean(mask["head"] == 0) < 1


def test_importance_one_is_the_inner_optimizer():
    inner = optax.sgd(0.1)
    tx, params = importance.weighed(inner, lambda name, begun, total: 1.0), {"x": np.float32([1, 2])}
    updates = tx.update({"x": np.float32([3, 4])}, tx.init(params), params)[0]
    np.testing.assert_allclose(updates["x"], [-0.3, -0.4], rtol=1e-6)
