"""A mixture of experts against a loop over tokens, and its statistics on their way out of a stack."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.compare import close
from tests.support.models import IMAGES, TOKENS, initial
from vlm_jax import models
from vlm_jax.errors import UserError
from vlm_jax.models.moe import Moe, moe

RNG = np.random.default_rng(0)
SIZES = dict(width=32, depth=3, heads=2, mlp_dim=24, mlp=moe(experts=4, top_k=2))


def by_loop(params, x, real, top_k, renormalise, gated):
    """Token by token, expert by expert."""
    gelu = np.vectorize(lambda t: 0.5 * t * (1 + math.tanh(math.sqrt(2 / math.pi) * (t + 0.044715 * t**3))))
    experts, router = params["experts"], params["router"]["kernel"]
    y, probability, share = np.zeros_like(x), *np.zeros((2, len(x), router.shape[1]))
    for b, row in enumerate(x):
        for i, token in enumerate(row):
            p = np.exp(token @ router)
            p /= p.sum()
            best = np.argsort(-p)[:top_k]
            total = p[best].sum() if renormalise else 1
            for e in best:
                dense = lambda name, x, e=e: x @ experts[name]["kernel"][e] + experts[name]["bias"][e]
                hidden = gelu(dense("gate", token)) * dense("fc1", token) if gated else gelu(dense("fc1", token))
                y[b, i] += p[e] / total * dense("fc2", hidden)
            probability[b] += real[b, i] * p / real[b].sum()
            share[b, best] += real[b, i] / real[b].sum() / top_k
    return y, probability, share


@pytest.mark.parametrize(
    ("top_k", "renormalise", "gated"), [(1, False, False), (2, True, True), (3, True, False)], ids=str
)
def test_moe_is_the_loop(top_k, renormalise, gated):
    x = RNG.standard_normal((2, 5, 6))
    real = np.arange(5) < np.array([[5], [3]])
    fields = dict(width=7, gated=gated, dtype="float64", experts=3, top_k=top_k, renormalise=renormalise)
    with jax.enable_x64(True):
        shapes = jax.eval_shape(Moe(**fields).init, jax.random.key(0), x)["params"]
        params = jax.tree.map(lambda leaf: RNG.standard_normal(leaf.shape), shapes)
        y, found = Moe(**fields).apply({"params": params}, x, real)
    want = by_loop(params, x, real, top_k, renormalise, gated)
    for got, value in zip((y, found["router_probability"], found["router_share"]), want, strict=True):
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, value, atol=1e-12)


@pytest.fixture(scope="module")
def stacks():
    """(loop of blocks, scan with remat), and the parameters of both."""
    loop = models.TextTransformer(**SIZES, vocab_size=14, length=8, pad_mask=True)
    params = initial(loop, TOKENS)
    blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[f"blocks_{i}"] for i in range(3)))
    rest = {name: leaf for name, leaf in params.items() if not name.startswith("blocks_")}
    return (loop, params), (loop.clone(scan=True, remat="full"), rest | {"blocks": blocks})


@functools.partial(jax.jit, static_argnums=0)
def encode(model, params, token_ids):
    return model.apply({"params": params}, token_ids)


def test_statistics_leave_a_loop_and_a_scan(stacks):
    of_loop, of_scan = (encode(*stack, TOKENS) for stack in stacks)
    close(of_scan, of_loop)
    assert of_loop.aux.keys() == {"router_probability", "router_share"}
    for rows in of_loop.aux.values():
        assert rows.shape == (3, 3, 4) and rows.dtype == jnp.float32
        np.testing.assert_allclose(rows.sum(axis=-1), 1, rtol=1e-5)


def test_a_row_is_of_its_example_and_not_of_padding(stacks):
    both, alone = encode(*stacks[0], TOKENS), encode(*stacks[0], TOKENS[:1, :4])  # the first text, without padding
    close(jax.tree.map(lambda rows: rows[:1], both.aux), alone.aux)


def test_the_router_learns_from_statistics_through_remat(stacks):
    loss = lambda params, model: jnp.sum(jnp.square(model.apply({"params": params}, TOKENS).aux["router_probability"]))
    of_loop, of_scan = (jax.jit(jax.grad(functools.partial(loss, model=model)))(params) for model, params in stacks)
    routers = jnp.stack([of_loop[f"blocks_{i}"]["mlp"]["router"]["kernel"] for i in range(3)])
    assert float(jnp.abs(routers).max()) > 1e-3
    close(of_scan["blocks"]["mlp"]["router"]["kernel"], routers)


def test_equal_experts_are_one_mlp():
    """Upcycling: copies of a trained MLP start as this MLP, with any router."""
    plain = models.ViT(width=32, depth=1, heads=2, mlp_dim=24, patch=8)
    params = initial(plain, IMAGES)
    mixture = plain.clone(mlp=moe(experts=3))
    mlp = {"experts": jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), params["blocks_0"]["mlp"])}
    mlp["router"] = {"kernel": jnp.asarray(RNG.standard_normal((32, 3)), jnp.float32)}
    upcycled = params | {"blocks_0": params["blocks_0"] | {"mlp": mlp}}
    close(encode(mixture, upcycled, IMAGES).pooled, encode(plain, params, IMAGES).pooled)


def test_experts_start_as_mlps_do():
    kernel = jax.jit(Moe(width=64, experts=3, top_k=1, renormalise=False).init)(
        jax.random.key(0), jnp.zeros((1, 1, 64))
    )
    fc1 = kernel["params"]["experts"]["fc1"]["kernel"]
    np.testing.assert_allclose(fc1.std(axis=(1, 2)), math.sqrt(2 / 128), rtol=0.05)  # xavier's, of one expert
    assert float(jnp.abs(fc1[0] - fc1[1]).max()) > 0.1


def test_parts_are_values():
    assert moe(top_k=1) == moe(top_k=1) != moe(top_k=2) and hash(moe()) == hash(moe())
    sections = [dict(image=dict(SIZES, patch=8, mlp=mlp), text=None) for mlp in ("moe", {"name": "moe", "experts": 8})]
    assert models.build(sections[0]) == models.build(sections[1])


@pytest.mark.parametrize(
    ("mlp", "message"),
    [
        ("mo", r"config\.model\.image\.mlp is `mo`; expected one of: moe"),
        ({"name": "moe", "expert": 2}, r"config\.model\.image\.mlp has no key `expert`; did you mean `experts`\?"),
        ({"name": "moe", "experts": 2, "top_k": 3}, "2 experts, of which a token cannot choose 3; expected 1 to 2"),
    ],
)
def test_a_wrong_part_is_named(mlp, message):
    with pytest.raises(UserError, match=message):
        models.build(dict(image=dict(SIZES, patch=8, mlp=mlp), text=None))
