"""FLOPs counted in jaxprs against formulas of the models' products, with and without scan, remat and accumulation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import cappa, clip, siglip, ul2
from vlm_jax import config
from vlm_jax.kernels import contrastive
from vlm_jax.kernels.attention import attention
from vlm_jax.plan import train_step
from vlm_jax.run.flops import hardware_flops

WIDTH, HIDDEN, BATCH, DEPTH = 32, 64, 32, 2


def close(counted, formula):
    assert counted == pytest.approx(formula, rel=0.02), f"{counted / formula:.4f} of the formula"


# Of the forward pass, for one example: 2 m k n for each product.
def self_attention(length, width=WIDTH):
    return 2 * length * 4 * width**2 + 4 * length**2 * width


def mlp(length, width=WIDTH, hidden=HIDDEN, matrices=2):
    return 2 * length * matrices * width * hidden


def cross_attention(length, context, width=WIDTH):
    return 2 * (2 * length + 2 * context) * width**2 + 4 * length * context * width


def settings_of(name, scan, remat):
    """A tiny config in the shape of a shipped one."""
    module = dict(clip=clip, siglip=siglip, cappa=cappa, ul2=ul2)[name]
    settings = config.plain(module.get_config("smoke"))
    blocks = dict(depth=DEPTH, scan=scan, remat=remat, width=WIDTH, heads=4, mlp_dim=HIDDEN)
    for tower in settings["model"].values():
        if isinstance(tower, dict):
            tower.update(blocks)
    if name in ("clip", "siglip"):
        settings["model"]["image"].update(pool="map" if name == "siglip" else "tok", out_dim=16)
        settings["model"]["text"].update(out_dim=16)
    settings["batch_size"] = BATCH
    settings["optimizer"] = dict(name="adamw", lr=1e-3)
    settings["mesh"] = dict(fsdp=4)
    return settings


def forward_of(name):
    """(blocks of all towers, the rest but the first product, the first product: its input needs no gradient)."""
    patches, pixels = (32 // 8) ** 2, 8 * 8 * 3
    stem = 2 * patches * pixels * WIDTH
    blocks = lambda length: DEPTH * (self_attention(length) + mlp(length))
    if name == "clip":  # with a cls token
        return blocks(patches + 1) + blocks(8), 2 * 2 * WIDTH * 16 + 2 * BATCH * 16, stem
    if name == "siglip":
        pool = cross_attention(1, patches) + mlp(1)
        return blocks(patches) + blocks(8), pool + 2 * 2 * WIDTH * 16 + 2 * BATCH * 16, stem
    decoder = lambda length, context, matrices=2: (
        DEPTH * (self_attention(length) + cross_attention(length, context) + mlp(length, matrices=matrices))
    )
    if name == "cappa":
        return blocks(patches) + decoder(8, patches), 2 * 8 * WIDTH * 2985, stem
    encoder = DEPTH * (self_attention(48) + mlp(48, matrices=3))
    return encoder + decoder(48, 48, 3), 2 * 48 * WIDTH * 3088, 0


@functools.cache
def step_of(name, scan, remat):
    return train_step.traced(settings_of(name, scan, remat), jax.devices())


CASES = [(name, *case) for name in ("clip", "siglip", "cappa", "ul2") for case in ((True, "full"), (False, "none"))]


@pytest.mark.parametrize(("name", "scan", "remat"), CASES)
def test_train_steps(name, scan, remat):
    """A gradient is two products for each; remat repeats the blocks less their last product, chunks the logits."""
    step = step_of(name, scan, remat)
    blocks, rest, stem = forward_of(name)
    model = BATCH * (3 * (blocks + rest) + 2 * stem)
    close(step.model_flops * 8, model)
    again = 0
    if remat == "full":
        tokens = dict(clip=17 + 8, siglip=16 + 8, cappa=16 + 8, ul2=48 + 48)[name]
        again += blocks - DEPTH * 2 * tokens * WIDTH * HIDDEN
    if name == "ul2":  # 48 positions, 8 at a time
        again += rest
    if name in ("clip", "siglip"):  # logits of pairs
        again += 2 * BATCH * 16
    close(step.flops * 8, model + BATCH * again)


def test_accumulation_encodes_twice():
    once = step_of("clip", False, "none")
    twice = train_step.traced(settings_of("clip", True, "none") | dict(accumulate=2), jax.devices())
    blocks, rest, stem = forward_of("clip")
    assert once.model_flops == twice.model_flops
    close((twice.flops - once.flops) * 8, BATCH * (blocks + rest + stem))


def test_locked_towers_have_no_gradients():
    settings = settings_of("clip", True, "none")
    settings["optimizer"]["params"] = [["image/.*", dict(freeze=True)], [".*", {}]]
    step = train_step.traced(settings, jax.devices())
    image = DEPTH * (self_attention(17) + mlp(17)) + 2 * 16 * 192 * WIDTH + 2 * WIDTH * 16
    text = DEPTH * (self_attention(8) + mlp(8)) + 2 * WIDTH * 16
    close(step.model_flops * 8, BATCH * (image + 3 * text + 2 * 2 * BATCH * 16))


def test_published_sizes():
    """CLIP's L/14: of its own batch, tokens and widths."""
    step = train_step.traced(clip.get_config("L/14"), jax.devices())
    image = 24 * (self_attention(257, 1024) + mlp(257, 1024, 4096))
    text = 12 * (self_attention(77, 768) + mlp(77, 768, 3072))
    stem, heads, pairs = 2 * 256 * 588 * 1024, 2 * (1024 + 768) * 768, 2 * 32_768 * 768
    close(step.model_flops * 8, 32_768 * (3 * (image + text + heads + pairs) + 2 * stem))


def flops(fn, *args):
    return hardware_flops(jax.make_jaxpr(fn)(*args))


def test_loops_branches_and_convolutions():
    x = jnp.ones((4, 4))
    product = 2 * 4**3
    assert flops(lambda x: jax.lax.scan(lambda c, _: (c @ x, None), x, length=7)[0], x) == 7 * product
    assert flops(lambda x: jax.lax.fori_loop(0, 5, lambda _, c: c @ x, x), x) == 5 * product
    assert flops(lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x, x), x) == 2 * product
    assert flops(lambda x: (x, x @ x)[0], x) == 0  # nobody reads it
    assert flops(jax.vmap(lambda x: x @ x), jnp.ones((3, 4, 4))) == 3 * product
    images, kernel = jnp.ones((2, 3, 8, 8)), jnp.ones((5, 3, 2, 2))
    assert flops(lambda i, k: jax.lax.conv(i, k, (2, 2), "VALID"), images, kernel) == 2 * (2 * 5 * 4 * 4) * (3 * 2 * 2)


@pytest.mark.parametrize("lengths", [(16, 16), (5, 24)])
def test_attention_kernels_count_as_xla_does(lengths):
    """The kernels' forward and backward: 2 and 5 products, where XLA's backward has 4, having kept the softmax."""
    lq, lk = lengths
    q, k, v = (jnp.ones((2, length, 4, 32)) for length in (lq, lk, lk))
    product = 2 * 2 * lq * lk * 128
    run = lambda name: lambda *a: attention(*a, implementation=name).sum()
    both = lambda name: jax.value_and_grad(run(name), (0, 1, 2))
    assert flops(run("tpu_interpret"), q, k, v) == flops(run("xla"), q, k, v) == 2 * product
    assert flops(both("tpu_interpret"), q, k, v) == 7 * product
    assert flops(both("xla"), q, k, v) == 6 * product


def test_kernels_of_pairs_and_those_unknown():
    x = jnp.ones((256, 128))
    lse = lambda x, y: sum(s.sum() for s in contrastive.pairwise_logsumexp(x, y, 1.0, implementation="tpu_interpret"))
    product = 2 * 256 * 256 * 128
    assert flops(lse, x, x) == product
    assert flops(jax.grad(lse, (0, 1)), x, x) == 4 * product
    gpu = lambda *a: attention(*a, implementation="gpu_interpret")
    q = jnp.ones((2, 64, 4, 32))  # whole blocks, so nothing is padded
    assert flops(gpu, q, q, q) == pytest.approx(2 * 2 * 2 * 64 * 64 * 128, rel=0.02)
    assert np.isfinite(flops(jax.grad(lambda q: gpu(q, q, q).sum()), q))
