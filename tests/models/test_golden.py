"""Forward passes against the reference arrays of `tests/golden` (fp32, non-square images)."""

import flax
import jax
import numpy as np
import pytest

from tests.support.paths import GOLDEN
from vlm_jax import models
from vlm_jax.zoo import key_map
from vlm_jax.zoo.formats import big_vision
from vlm_jax.zoo.load import read_params
from vlm_jax.zoo.readers.tensors import open_tensors
from vlm_jax.zoo.released import ANY, Told

SIZES = dict(width=32, depth=2, mlp_dim=128, heads=2)
IMAGE = dict(**SIZES, patch=16)
TEXT = dict(**SIZES, vocab_size=64, length=16)


def load(name, model, *inputs):
    arrays = dict(np.load(GOLDEN / f"{name}.npz"))
    args = [None if key is None else arrays[key] for key in inputs]
    like = flax.traverse_util.flatten_dict(jax.eval_shape(model.init, jax.random.key(0), *args)["params"], sep="/")
    tensors = big_vision.of_today(open_tensors(GOLDEN / f"{name}.npz").tensors)
    entries = big_vision.describe(tensors, Told(pool=ANY))[1]
    if len(args) == 1:  # the table is of two towers
        entries = [entry._replace(ours=entry.ours.partition("/")[2]) for entry in entries]
    plan = key_map.match(entries, like, tensors, (), name)
    return arrays, {"params": flax.traverse_util.unflatten_dict(read_params(plan, like, tensors), sep="/")}, args


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("vit_gap_learn", dict(pool="gap", rep_dim=32)),
        ("vit_map_sincos2d", dict(pool="map", posemb="sincos2d")),
        ("vit_tok_learn", dict(pool="tok")),
    ],
)
def test_vit(name, fields):
    model = models.ViT(**IMAGE, **fields, out_dim=7)
    arrays, variables, args = load(name, model, "image")
    encoded = jax.jit(model.apply)(variables, *args)
    close(encoded.pooled, arrays["logits"])
    close(encoded.tokens, arrays["encoded"])


@pytest.mark.parametrize(("name", "pool"), [("text_last", "last"), ("text_map", "map")])
def test_text(name, pool):
    model = models.TextTransformer(**TEXT, pool=pool, out_dim=9)
    arrays, variables, args = load(name, model, "text")
    encoded = jax.jit(model.apply)(variables, *args)
    close(encoded.pooled, arrays["logits"])
    close(encoded.tokens @ arrays["params/Embed_0/embedding"].T, arrays["vocab_logits"])
    assert encoded.mask is None


@pytest.mark.parametrize("scan", [False, True])
def test_siglip(scan):
    model = models.build(
        dict(
            name="two_tower",
            image=dict(**IMAGE, pool="map", scan=scan),
            text=dict(**TEXT, pool="last", out_dim=32, scan=scan),
            bias_init=-10.0,
        )
    )
    arrays, variables, args = load("siglip_scan" if scan else "siglip_loop", model, "image", "text")
    out = jax.jit(model.apply)(variables, *args)
    close(out.image, arrays["zimg"])
    close(out.text, arrays["ztxt"])
    close(out.scale, arrays["t"][0])  # stored as its log
    close(out.bias, arrays["b"][0])


def test_resample_posemb():
    arrays = np.load(GOLDEN / "resample_posemb.npz")
    for side in (7, 3):
        close(models.resample_posemb(arrays["old"], (4, 4), (side, side)), arrays[f"to{side}"])
    close(models.resample_posemb(arrays["old"], (4, 4), (4, 4)), arrays["old"])
