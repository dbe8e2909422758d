import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.support.paths import GOLDEN
from vlm_jax.errors import UserError
from vlm_jax.params import optim

STORED = np.load(GOLDEN / "adafactor.npz")
FLAT = {"name": "constant"}
FROZEN = ("img/.*", {"freeze": True})


def params():
    keys = iter(jax.random.split(jax.random.key(0), 9))
    normal = lambda *shape: jax.random.normal(next(keys), shape)
    return {
        "img": {"kernel": normal(4, 6).at[0, 0].set(-0.0), "bias": normal(6)},
        "txt": {"blocks": {"fc1": {"kernel": normal(2, 4, 6)}}, "kernel": normal(4, 6), "embedding": normal(5, 4)},
        "logit_scale": normal(),
    }


def gradients(step):
    leaves, structure = jax.tree.flatten(params())
    keys = jax.random.split(jax.random.fold_in(jax.random.key(7), step), len(leaves))
    return structure.unflatten([jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)])


def run(tx, p, steps=3):
    state = tx.init(p)
    update = jax.jit(lambda g, state, p: (lambda u: (optax.apply_updates(p, u[0]), u[1]))(tx.update(g, state, p)))
    for step in range(steps):
        p, state = update(gradients(step), state, p)
    return p


def build(**section):
    return optim.build({"name": "adamw", "lr": 0.1, "schedule": FLAT, **section}, params(), 10)


def assert_close(got, want, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, want)


def test_adafactor_is_that_of_the_published_runs():
    """Four steps with a frozen group, a multiplier of 0.1 on biases, decay on kernels and clipping, step by step."""
    names = ("a/kernel", "a/bias", "frozen/kernel")
    tree = lambda kind: {name: jnp.asarray(STORED[f"{kind}/{name}"]) for name in names}
    p = tree("params_after0")  # the first step has learning rate 0
    section = {
        "name": "adafactor", "lr": 0.01, "weight_decay": 0.1, "clip_norm": 1.0,
        "schedule": {"name": "rsqrt", "warmup": 3, "cooldown": 3, "timescale": 5},
        "params": (("frozen/.*", {"freeze": True}), (".*/bias", {"lr": 0.1}), (".*", {})),
    }  # fmt: skip
    tx, _, schedule = optim.build(section, p, 12)
    state = tx.init(p)
    assert len([x for x in jax.tree.leaves(state) if x.shape == (4, 4)]) == 0  # nothing kept for the frozen kernel
    assert [x.shape for x in jax.tree.leaves(state) if x.dtype == jnp.bfloat16] == [(48,), (64, 48)]
    for step in range(4):
        updates, state = tx.update(tree(f"grad{step}"), state, p)
        p = optax.apply_updates(p, updates)
        assert_close(p, tree(f"params_after{step}"), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(p["a/bias"], STORED[f"params_after{step}/a/bias"], rtol=1e-5, atol=1e-10)
        np.testing.assert_allclose(schedule(step), 0.01 * STORED["schedule"][step], rtol=1e-6)


def test_adamw_is_optax_s_with_decay_on_kernels():
    section = {"b1": 0.8, "b2": 0.98, "weight_decay": 0.2, "schedule": {"name": "cosine", "warmup": 2}}
    tx, table, schedule = build(**section, clip_norm=0.5)
    mask = {"img": {"kernel": True, "bias": False}, "logit_scale": False,
            "txt": {"blocks": {"fc1": {"kernel": True}}, "kernel": True, "embedding": False}}  # fmt: skip
    adamw = optax.adamw(schedule, b1=0.8, b2=0.98, weight_decay=0.2, mask=mask)
    assert_close(run(tx, params()), run(optax.chain(optax.clip_by_global_norm(0.5), adamw), params()))
    assert table["txt/kernel"] == "lr x1, wd x1" and table["txt/embedding"] == "lr x1, wd x0"
    assert set(build(params=((".*", {"wd": 0.5}),))[1].values()) == {"lr x1, wd x0.5"}


def test_groups_have_their_multipliers_and_schedules():
    rules = ((".*/kernel", {"lr": 0.1, "schedule": {"name": "linear", "end": 0.5}}), (".*", {}))
    tx, table, _ = build(name="sgd", params=rules)
    start, got = params(), run(tx, params(), 2)
    g = [gradients(0), gradients(1)]
    np.testing.assert_allclose(
        start["img"]["bias"] - got["img"]["bias"], 0.1 * (g[0]["img"]["bias"] + g[1]["img"]["bias"]), rtol=1e-4
    )
    moved = 0.01 * (g[0]["txt"]["kernel"] + 0.95 * g[1]["txt"]["kernel"])
    np.testing.assert_allclose(start["txt"]["kernel"] - got["txt"]["kernel"], moved, atol=1e-6)
    assert table["txt/kernel"] == "lr x0.1, wd x1, name=linear end=0.5"


@pytest.mark.parametrize("decay, factor", [("lr", 0.1 * 0.3), ("schedule", 1.0)])
@pytest.mark.parametrize("name", ["adamw", "sgd", "adam"])
def test_weight_decay_conventions(name, decay, factor):
    """Zero gradients leave decay alone: p <- p (1 - factor w); factor is lr x multiplier, or the schedule (here 1)."""
    tx, _, _ = build(name=name, weight_decay=0.2, decay=decay, params=((".*", {"lr": 0.3, "wd": 0.5}),))
    p = params()
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, p), tx.init(p), p)
    assert_close(updates, jax.tree.map(lambda x: -factor * 0.2 * 0.5 * x, p))


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon", "sgd", "adam"])
def test_frozen_parameters_keep_their_bits_and_have_no_state(name):
    tx, table, _ = build(name=name, weight_decay=0.1, clip_norm=1.0, params=(FROZEN, (".*", {})))
    p = params()
    got = run(tx, p, 3)
    for leaf in ("kernel", "bias"):
        assert np.asarray(got["img"][leaf]).tobytes() == np.asarray(p["img"][leaf]).tobytes()  # -0.0 stays -0.0
        assert table[f"img/{leaf}"] == "frozen"
    assert not np.any(np.isclose(got["txt"]["embedding"], p["txt"]["embedding"], rtol=0, atol=1e-7))
    assert not any("img" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tx.init(p)))


def test_the_norm_that_is_clipped_is_of_trained_gradients():
    tx, _, _ = build(name="sgd", clip_norm=1.0, params=(FROZEN, (".*", {})))
    p = params()
    updates, _ = tx.update(gradients(0), tx.init(p), p)
    np.testing.assert_allclose(optax.tree.norm(updates["txt"] | {"s": updates["logit_scale"]}), 0.1, rtol=1e-5)


def test_muon_orthogonalises_kernels_layer_by_layer():
    tx, _, _ = build(name="muon", lr=1.0, ns_steps=10, consistent_rms=None)
    p = params()
    state = tx.init(p)
    updates, _ = tx.update(gradients(0), state, p)
    stacked = updates["txt"]["blocks"]["fc1"]["kernel"]
    for kernel in (updates["txt"]["kernel"], *stacked):
        singular = np.linalg.svd(kernel / np.sqrt(1.5), compute_uv=False)  # sqrt(fan_out / fan_in) = sqrt(6 / 4)
        assert np.all((singular > 0.6) & (singular < 1.3))
    adam = optax.adamw(1.0, b2=0.95, weight_decay=0.0, nesterov=True)
    rest = lambda tree: {"bias": tree["img"]["bias"], "embedding": tree["txt"]["embedding"], "s": tree["logit_scale"]}
    assert_close(rest(updates), adam.update(rest(gradients(0)), adam.init(rest(p)), rest(p))[0])
    alone = {"txt": {"kernel": p["txt"]["blocks"]["fc1"]["kernel"][1]}}
    tx, _, _ = optim.build(
        {"name": "muon", "lr": 1.0, "schedule": FLAT, "ns_steps": 10, "consistent_rms": None}, alone, 10
    )
    one, _ = tx.update({"txt": {"kernel": gradients(0)["txt"]["blocks"]["fc1"]["kernel"][1]}}, tx.init(alone), alone)
    np.testing.assert_allclose(stacked[1], one["txt"]["kernel"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "adafactor"])
def test_momentum_dtype(name):
    tx, _, _ = build(name=name, mu_dtype="bfloat16")
    assert any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(jax.eval_shape(tx.init, params())))


def test_shapes_are_enough():
    shapes = jax.eval_shape(params)
    tx, _, _ = optim.build({"name": "adamw", "lr": 0.1}, shapes, 10)
    assert_close(run(tx, params()), run(optim.build({"name": "adamw", "lr": 0.1}, params(), 10)[0], params()), 0, 0)


def test_ema():
    ema, p = {"w": jnp.ones(3), "frozen": jnp.float32(0.1)}, {"w": jnp.zeros(3), "frozen": jnp.float32(0.1)}
    update = jax.jit(optim.ema_update, static_argnums=2)
    np.testing.assert_allclose(update(ema, p, 0.999, 0)["w"], 0.1, rtol=1e-6)
    np.testing.assert_allclose(update(ema, p, 0.999, 10**6)["w"], 0.999, rtol=1e-6)
    assert update(ema, p, 0.999, 5)["frozen"] == p["frozen"]


@pytest.mark.parametrize(
    "section, message",
    [
        ({"name": "adamv"}, "config.optimizer.name is `adamv`, which is no optimizer of optax; did you mean `adam`"),
        ({"name": "apply_updates"}, "which is no optimizer"),
        ({"epz": 0.9}, r"config.optimizer \(adamw\) has no key `epz`; did you mean `eps`"),
        ({"clip_nrm": 1.0}, "no key `clip_nrm`; did you mean `clip_norm`"),
        ({"learning_rate": 1.0}, "no key `learning_rate`"),
        ({"decay": "cosine"}, "config.optimizer.decay is `cosine`; expected one of: lr, schedule"),
        ({"schedule": {"warmup": "x"}}, "config.optimizer.schedule.warmup: a duration is 'x'"),
        (
            {"params": (("text/.*", {}), (".*", {}))},
            r"config.optimizer.params: the rule `text/\.\*` matches no parameter",
        ),
        ({"params": (("img/.*", {}),)}, "config.optimizer.params: no rule matches `logit_scale`"),
        ({"params": ((".*", {"freez": True}),)}, "no key `freez`; did you mean `freeze`"),
        ({"params": ((".*", {"lr": 0.0}),)}, "expected a multiplier above 0, or use freeze=True"),
        ({"params": ((".*", {"freeze": True}),)}, "freezes every parameter"),
    ],
)
def test_mistakes_are_named(section, message):
    with pytest.raises(UserError, match=message) as error:
        build(**section)
    assert "\n" not in str(error.value)
