"""Scores of scalars and of blocks; SPIDER's optimizer: against loops in float64; with importance 1, the inner one."""

import jax
import numpy as np
import optax
import pytest

from vlm_jax.errors import UserError
from vlm_jax.params import importance, layers, masks, transforms


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


def layers_of(tree):
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


def test_scores_by_hand():
    """Each against the sum over batches in float64, scalar by scalar; one pass, of a generator."""
    rng = np.random.default_rng(0)
    batches = [{"a": rng.normal(size=(2, 3)), "b": rng.normal(size=4)} for _ in range(5)]
    want = {
        "gradient": lambda g: abs(sum(g) / 5),
        "fisher": lambda g: sum(x * x for x in g) / 5,
        "sensitivity": lambda g: sum(x * x for x in g),
        "movement": lambda g: abs(sum(g)),
    }
    with jax.enable_x64():
        for kind, score in want.items():
            found = importance.scores(kind, iter(batches))
            for name, leaf in found.items():
                for at in np.ndindex(leaf.shape):
                    np.testing.assert_allclose(leaf[at], score([float(b[name][at]) for b in batches]), rtol=1e-12)
    with pytest.raises(UserError, match="the importance is `fischer`; expected one of: gradient, fisher"):
        importance.scores("fischer", batches)
    with pytest.raises(UserError, match="`fisher` has nothing to read"):
        importance.scores("fisher", [])


def test_block_totals_by_hand():
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.normal(size=shape) ** 2
    tree = {
        "image": {"patch_embed": draw(4), "blocks": {"fc": draw(3, 4, 5), "bias": draw(3, 5)}, "norm": draw(4)},
        "text": {"blocks_0": {"fc": draw(2, 2)}, "blocks_1": {"fc": draw(2, 2)}, "head": draw(2)},
    }
    found = layers.block_totals(tree)
    blocks = tree["image"]["blocks"]
    want = {("image/", i + 1): blocks["fc"][i].sum() + blocks["bias"][i].sum() for i in range(3)}
    want |= {("text/", i + 1): tree["text"][f"blocks_{i}"]["fc"].sum() for i in range(2)}
    assert list(found) == list(want)
    np.testing.assert_allclose(list(found.values()), list(want.values()), rtol=1e-12)
    mask = masks.of_blocks(tree, [("image/", 2), ("text/", 1)])
    assert masks.count(mask, tree) == 4 * 5 + 5 + 4
    assert mask["text"]["blocks_0"]["fc"] is True and mask["image"]["norm"] is False
    np.testing.assert_array_equal(mask["image"]["blocks"]["bias"].ravel(), [False, True, False])
