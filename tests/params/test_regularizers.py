import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.compare import bits, close
from vlm_jax.errors import UserError
from vlm_jax.params import optim, regularizers, transforms


def test_mixout():
    draw = lambda seed: {"w": np.random.default_rng(seed).standard_normal(16).astype(np.float32)}
    params, base, key = draw(0), draw(1), jax.random.key(0)
    p, draws = 0.3, 4000
    assert bits(regularizers.mixout(key, params, base, 0.0)) == bits(params)
    assert bits(regularizers.mixout(key, params, base, 1 - 1e-7)) == bits(base)  # nothing of 16 scalars is kept
    keys = jax.random.split(key, draws)
    mixed = np.asarray(jax.jit(jax.vmap(lambda key: regularizers.mixout(key, params, base, p)["w"]))(keys))
    w, u = params["w"], base["w"]
    kept = (w - p * u) / (1 - p)
    replaced = mixed == u
    np.testing.assert_allclose(mixed, np.where(replaced, u, kept), rtol=1e-5, atol=1e-6)
    sigma = np.sqrt(p * (1 - p) / draws)
    np.testing.assert_allclose(replaced.mean(axis=0), p, atol=5 * sigma)
    assert np.all(np.abs(mixed.mean(axis=0) - w) < 5 * sigma * np.abs(u - kept) + 1e-5)  # params in expectation
    assert len(np.unique(replaced, axis=0)) > draws / 2  # of 2 ** 16: scalars are drawn one by one
    one = regularizers.mixout(keys[0], params, base, p)
    np.testing.assert_allclose(one["w"], mixed[0], rtol=1e-6)
    gradient = jax.grad(lambda params: jnp.sum(regularizers.mixout(keys[0], params, base, p)["w"]))(params)
    np.testing.assert_allclose(gradient["w"], np.where(replaced[0], 0, 1 / (1 - p)), rtol=1e-6)
    for p in (-0.1, 1.0):
        with pytest.raises(UserError, match=f"p of mixout is {p}"):
            regularizers.mixout(key, params, base, p)


def test_mixout_draws_by_name():
    zeros, ones = ({name: np.full(200, value, np.float32) for name in "ab"} for value in (0, 1))
    mixed = regularizers.mixout(jax.random.key(0), zeros, ones, 0.5)
    replaced = {name: np.asarray(mixed[name]) == 1 for name in "ab"}
    assert 0.3 < np.mean(replaced["a"] == replaced["b"]) < 0.7
    alone = regularizers.mixout(jax.random.key(0), {"b": zeros["b"]}, {"b": ones["b"]}, 0.5)
    np.testing.assert_array_equal(alone["b"], mixed["b"])


def test_l2_sp():
    draw = lambda rng: {"image": {"kernel": rng.standard_normal((4, 3)), "bias": rng.standard_normal(3)}}
    params, base = (jax.tree.map(np.float32, draw(np.random.default_rng(seed))) for seed in (0, 1))
    distance = sum(np.sum((x - y) ** 2) for x, y in zip(*map(jax.tree.leaves, (params, base)), strict=True))
    value, gradient = jax.jit(jax.value_and_grad(regularizers.l2_sp))(params, base, 0.1)
    np.testing.assert_allclose(value, 0.05 * distance, rtol=1e-6)
    expected = jax.tree.map(lambda x, y: np.float32(0.1) * (x - y), params, base)
    close(gradient, expected, rtol=1e-6, atol=1e-6)
    close(regularizers.l2_sp_gradient(params, base, 0.1), expected, rtol=1e-6, atol=1e-6)


def test_ewc():
    rng = np.random.default_rng(0)
    draw = lambda: {"kernel": rng.standard_normal((4, 3)).astype(np.float32), "bias": rng.random(3).astype(np.float32)}
    params, base, fisher = draw(), draw(), jax.tree.map(np.abs, draw())
    value, gradient = jax.value_and_grad(regularizers.ewc)(params, base, fisher, 0.3)
    wanted = sum(
        0.15 * np.sum(np.float64(fisher[k]) * (np.float64(params[k]) - np.float64(base[k])) ** 2) for k in params
    )
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    close(regularizers.ewc_gradient(params, base, fisher, 0.3), gradient, rtol=1e-6, atol=1e-6)
    ones = jax.tree.map(np.ones_like, params)
    np.testing.assert_allclose(regularizers.ewc(params, base, ones, 0.3), regularizers.l2_sp(params, base, 0.3))


def test_ewc_begins_a_stage_though_no_term_counts_yet():
    tx = optim._held(transforms.transform(dict(name="ewc", weight=1.0, decay=0.0), "config"), "term")
    params, one = {"w": np.zeros(2, np.float32)}, {"w": np.ones(2, np.float32)}
    _, state = tx.update(one, tx.init(params), params, active={"term": True}, begins=False)
    _, state = tx.update(one, state, one, active={"term": False}, begins=True)
    updates, _ = tx.update(one, state, {"w": 3 * one["w"]}, active={"term": True}, begins=False)
    np.testing.assert_array_equal(updates["w"], one["w"] + (3 - 1))  # F is 1, the anchor too


@pytest.mark.parametrize("weight", [0.0, 5.0])
def test_ewc_of_a_run(weight):
    """Three stages of four steps of SGD, against numpy: no pull in the first, then towards the ends of stages."""
    tx = transforms.transform(dict(name="ewc", weight=weight, decay=0.75, keep=0.5), "config")
    rng = np.random.default_rng(0)
    params = {"w": rng.standard_normal(5).astype(np.float32)}
    state, update = tx.init(params), jax.jit(lambda *args: tx.update(*args[:3], begins=args[3]))
    theta = anchor = params["w"].astype(np.float64)
    squares, fisher = np.zeros(5), np.zeros(5)
    for step in range(12):
        gradient = rng.standard_normal(5).astype(np.float32)
        begins = step in (4, 8)
        if begins:
            fisher, anchor = 0.5 * fisher + squares, theta
        squares = 0.75 * squares + 0.25 * np.float64(gradient) ** 2
        updates, state = update({"w": gradient}, state, params, begins)
        wanted = gradient + weight * fisher * (theta - anchor)
        np.testing.assert_allclose(updates["w"], wanted, rtol=1e-5, atol=1e-6)
        if step < 4 or not weight:
            np.testing.assert_array_equal(updates["w"], gradient)
        params = {"w": np.asarray(params["w"] - 0.1 * updates["w"])}
        theta = theta - 0.1 * wanted
    assert np.any(np.abs(wanted - gradient) > 0.1) == bool(weight)
