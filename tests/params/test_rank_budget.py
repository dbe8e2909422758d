"""AdaLoRA's budget of ranks, step by step, against loops over terms and scalars in float64."""

import jax
import numpy as np
import optax
import pytest

from vlm_jax.errors import UserError
from vlm_jax.params import optim

SHAPES = {"x/inserted_a": (4, 3), "x/inserted_b": (3, 5), "x/inserted_singular": (3,)}
SHAPES |= {"blocks/y/inserted_a": (2, 4, 3), "blocks/y/inserted_b": (2, 3, 2), "blocks/y/inserted_singular": (2, 3)}
STEPS, PARTS = 12, ("a", "b", "singular")


def draw(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


def build(params, **budget):
    rules = ((".*inserted.*", dict(budget=budget)), (".*", {}))
    section = dict(name="sgd", lr=0.125, schedule=dict(name="constant"), params=rules)
    return optim.build(section, params, STEPS)


def by_loops(params, begin, end, every, rank, b1=0.85, b2=0.85):
    """The parameters after each step."""
    p = {name: leaf.copy() for name, leaf in params.items()}
    mean = {name: np.zeros_like(leaf) for name, leaf in p.items()}
    spread = {name: np.zeros_like(leaf) for name, leaf in p.items()}
    terms = [("x", (), i) for i in range(3)] + [("blocks/y", (k,), i) for k in range(2) for i in range(3)]
    for t in range(STEPS):
        gradients = draw(t + 1)
        if t < end:
            for name in p:
                now = np.abs(p[name] * gradients[name])
                mean[name] = b1 * mean[name] + (1 - b1) * now
                spread[name] = b2 * spread[name] + (1 - b2) * np.abs(now - mean[name])
        for name in p:
            p[name] = p[name] - 0.125 * gradients[name]
        if t >= end or (t >= begin and (t - begin) % every == 0):
            scores = []
            for place, block, i in terms:
                a, b, w = ((mean[n] * spread[n])[block] for n in (f"{place}/inserted_{x}" for x in PARTS))
                scores.append(w[i] + np.mean(a[:, i]) + np.mean(b[i]))
            left = 1 - min((t - begin) / (end - begin), 1)
            count = int(3 * rank + (9 - 3 * rank) * left**3)
            for n in np.argsort(-np.array(scores), kind="stable")[count:]:
                place, block, i = terms[n]
                p[f"{place}/inserted_singular"][(*block, i)] = 0
        yield {name: leaf.copy() for name, leaf in p.items()}


@pytest.mark.parametrize("every", [1, 3])
def test_terms_go_by_importance(every):
    """Terms may come back until the end of the window; then 3 places share 4 terms."""
    with jax.enable_x64(True):
        params = draw(0)
        tx, table, _ = build(params, rank=4 / 3, begin=2, end="75%", every=every)
        assert "budget rank=1.333" in table["x/inserted_a"]
        state, update, left = tx.init(params), jax.jit(tx.update), []
        for t, want in enumerate(by_loops(params, 2, 9, every, 4 / 3)):
            updates, state = update(draw(t + 1), state, params)
            params = optax.apply_updates(params, updates)
            for name in SHAPES:
                np.testing.assert_allclose(params[name], want[name], rtol=1e-9, atol=1e-12)
            left.append(sum(np.sum(x != 0) for name, x in params.items() if name.endswith("singular")))
    assert left[:2] == [9, 9] and left[9:] == [4, 4, 4] and min(left) == 4


def test_a_whole_budget_is_the_optimizer():
    params = jax.tree.map(np.float32, draw(0))
    plain = optim.build(dict(name="adamw", lr=0.1), params, STEPS)[0]
    whole = optim.build(dict(name="adamw", lr=0.1, params=((".*", dict(budget=dict(rank=3))),)), params, STEPS)[0]
    found = {}
    for tx in (plain, whole):
        state, now = tx.init(params), params
        for t in range(3):
            updates, state = tx.update(jax.tree.map(np.float32, draw(t + 1)), state, now)
            now = optax.apply_updates(now, updates)
        found[tx] = now
    jax.tree.map(np.testing.assert_array_equal, *found.values())


def test_what_does_not_fit_is_named():
    with pytest.raises(UserError, match=r"budget: rank=0, every=10"):
        build(draw(0), rank=0)
    with pytest.raises(UserError, match="is for the singular values and both factors of LowRank"):
        tx = build({"x/inserted_a": np.ones((2, 2))}, rank=1)[0]
        tx.init({"x/inserted_a": np.ones((2, 2))})
