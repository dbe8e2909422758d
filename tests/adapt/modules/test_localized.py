"""LoFiT: scales and offsets of heads by loops, and the heads that learned scales choose."""

import jax
import numpy as np
import pytest

from tests.support.few_shot import NAMES, clip_like, pictures, tuned
from tests.support.models import initial
from vlm_jax import models
from vlm_jax.adapt.modules.localized import lofit
from vlm_jax.adapt.tune import tune
from vlm_jax.data import tokenizers
from vlm_jax.errors import UserError
from vlm_jax.models import insertion
from vlm_jax.models.insertions.heads import HeadOutputs
from vlm_jax.models.layers import Attention
from vlm_jax.params.table import map_with_name, named_leaves
from vlm_jax.pretrained import Pretrained

HEADS, WIDTH = 2, 6


@pytest.mark.parametrize("part", ["scale", "offset"])
def test_heads_by_loops(part):
    """float64; the base model bit for bit with parameters of 0."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        plain, x = Attention(HEADS, dtype="float64"), rng.normal(size=(2, 3, WIDTH))
        to64 = lambda tree: jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)
        params = plain.init(jax.random.key(0), x)["params"]
        model = insertion.inserted(plain, HeadOutputs("out", part, std=0.0))
        begun, params = to64(insertion.begin(jax.random.key(1), model, params, x)), to64(params)
        output = lambda model, params: np.asarray(model.apply({"params": params}, x)[0])
        np.testing.assert_array_equal(output(model, begun), output(plain, params))
        new = rng.normal(size=(HEADS, WIDTH // HEADS))
        got = output(model, map_with_name(lambda name, leaf: new if "inserted_" in name else leaf, begun))
    dense = lambda t, name: t @ params[name]["kernel"] + params[name]["bias"]
    want = np.zeros_like(x)
    for row in range(len(x)):
        found = []
        for head in range(HEADS):
            own = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
            q, k, v = (dense(x[row], name)[:, own] for name in ("query", "key", "value"))
            weights = np.exp(q @ k.T / np.sqrt(WIDTH // HEADS))
            z = (weights / weights.sum(1, keepdims=True)) @ v
            found.append((1 + new[head]) * z if part == "scale" else z + new[head])
        want[row] = dense(np.concatenate(found, axis=1), "out")
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-9)


def chosen(model):
    """Place -> which heads have offsets."""
    leaves = insertion.new_leaves(model.params)
    assert all(name.endswith("inserted_offset") for name in leaves)
    return {name: np.any(leaf, axis=-1) for name, leaf in leaves.items()}


def test_the_heads_with_the_largest_scales_get_offsets(monkeypatch):
    """What the first tuning ends with decides; the scales are gone; all else is the base model's."""
    base, seen = clip_like(scan=True), {}

    def largest(importance, count, largest=lofit.__globals__["masks"].largest):
        seen.update(importance=importance, count=count)
        return largest(importance, count)

    monkeypatch.setattr("vlm_jax.adapt.modules.localized.masks.largest", largest)
    few = tuned(base, lofit(base.model, share=0.25), pictures())
    found = chosen(few)
    importance = {name.replace("scale", "offset"): leaf for name, leaf in seen["importance"].items()}
    assert seen["count"] == sum(mask.sum() for mask in found.values()) == 3  # of 2 towers x 3 blocks x 2 heads
    least = min(importance[name][mask].min() for name, mask in found.items() if mask.any())
    assert all((importance[name][~mask] <= least).all() for name, mask in found.items())
    own = named_leaves(few.params)
    assert all(np.array_equal(own[name], leaf) for name, leaf in named_leaves(base.params).items())


def test_a_captioner_has_heads_too():
    tokenizer, sizes = tokenizers.build("emoji"), dict(width=16, depth=1, heads=2, mlp_dim=24)
    decoder = dict(sizes, vocab_size=tokenizer.vocab_size, length=8)
    model = models.build(dict(name="captioner", image=dict(sizes, patch=4), decoder=decoder))
    images, labels = pictures()
    ops = "decode | resize(8) | normalize", "lower | tokenize(8, bos=False)"
    base = Pretrained(model, initial(model, images[:1], np.zeros((1, 8), int)), tokenizer, *ops)
    recipe = lofit(model, share=0.5, where=r".*/(attn|cross_attn)/out", heads="random")
    few = tune(base, recipe, images, labels, NAMES, steps=1, batch_size=2)
    found = chosen(few)
    assert sum(mask.sum() for mask in found.values()) == 3  # of 3 attentions x 2 heads
    assert {name.split("/")[-3] for name in found} == {"attn", "cross_attn"}


def test_what_is_wrong_is_named(base):
    with pytest.raises(UserError, match="share of lofit is 0; expected a share of the heads above 0, up to 1"):
        lofit(base.model, share=0)
    with pytest.raises(UserError, match="the heads of lofit is `best`; expected one of: learned, random"):
        lofit(base.model, heads="best")
