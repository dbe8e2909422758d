"""Growth: the larger model computes what the smaller one did, with zeros and copies where they are due."""

import jax
import numpy as np
import pytest

from tests.support import models as tiny
from vlm_jax import models
from vlm_jax.errors import UserError
from vlm_jax.params import growth
from vlm_jax.params.table import named_leaves

LARGER = dict(width=64, heads=4, mlp_dim=144, depth=3)


def fresh(scan, **fields):
    """(the larger model, its initial parameters), with the heads of the embedding as they are"""
    section = tiny.section("two_tower", scan)
    section["image"] |= fields
    section["text"] |= {key: value for key, value in fields.items() if key in ("mlp_dim", "depth", "out_dim")}
    model = models.build(section)
    return model, tiny.initial(model, tiny.IMAGES, tiny.TOKENS)


@pytest.mark.parametrize("scan", [False, True])
def test_the_function_stays(scan):
    """Twice the width, more heads, units and blocks in the image tower; units and blocks in the text tower."""
    small = tiny.tiny("two_tower", scan)
    model, new = fresh(scan, **LARGER)
    grown = jax.jit(growth.grow)(small.params, new)
    want, got = small.apply(), tiny.run(model, grown, tiny.IMAGES, tiny.TOKENS)
    assert float(np.abs(want.image).max()) > 0.1
    for name in ("image", "text"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), atol=1e-6)
    leaves, initial = named_leaves(grown), named_leaves(new)
    block = "image/blocks" if scan else "image/blocks_0"
    at = (0,) if scan else ()
    fc1, fc2 = (np.asarray(leaves[f"{block}/mlp/{name}/kernel"])[at] for name in ("fc1", "fc2"))
    assert not np.any(fc2[64:]) and np.all(fc2[:64, :32] == fc2[:64, 32:])
    np.testing.assert_array_equal(fc1[:32, :64], fc1[32:, :64])
    np.testing.assert_array_equal(fc1[:, 64:], np.asarray(initial[f"{block}/mlp/fc1/kernel"])[at][:, 64:])
    out = np.asarray(leaves["image/blocks/attn/out/kernel"])[2] if scan else leaves["image/blocks_2/attn/out/kernel"]
    assert not np.any(out)


def test_momentum_mixes_with_initial_parameters():
    small = tiny.tiny("two_tower", True)
    _, new = fresh(True, **LARGER)
    run = jax.jit(lambda old, new: [growth.grow(old, new, momentum) for momentum in (1.0, 0.75)])
    whole, mixed = map(named_leaves, run(small.params, new))
    for name, leaf in named_leaves(new).items():
        np.testing.assert_allclose(mixed[name], 0.75 * np.float64(whole[name]) + 0.25 * np.float64(leaf), atol=1e-6)


def test_the_same_size_stays_bit_for_bit():
    small = tiny.tiny("two_tower")
    _, new = fresh(False)
    jax.tree.map(np.testing.assert_array_equal, growth.grow(small.params, new), small.params)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(width=48), "`image/blocks_0/norm1/scale` has 32 channels and would have 48; expected a multiple"),
        (dict(mlp_dim=48), r"`image/blocks_0/mlp/fc1/bias` of shape \(64,\) cannot become \(48,\)"),
        (dict(depth=1), "the larger model has no `image/blocks_1/attn/key/bias`"),
        (dict(out_dim=24), r"`image/head/bias` of shape \(16,\) cannot become \(24,\)"),
        (dict(qk_norm=True), "the smaller model has no `image/blocks_0/attn/"),
    ],
)
def test_mistakes_are_named(fields, message):
    _, new = fresh(False, **fields)
    with pytest.raises(UserError, match=message) as error:
        growth.grow(tiny.tiny("two_tower").params, new)
    assert "\n" not in str(error.value)


def test_the_momentum_is_a_share():
    with pytest.raises(UserError, match="the momentum of growth is 2; expected 0 to 1"):
        growth.grow({}, {}, 2)
