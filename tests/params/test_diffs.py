"""What differs between two trees of parameters: found, put back and saved, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.compare import bits
from tests.support.models import OUT, drawn, shapes_of
from vlm_jax.errors import UserError
from vlm_jax.params import diffs
from vlm_jax.zoo.adapters import load_diff, save_diff


@pytest.mark.parametrize("scan", [False, True])
def test_diff_and_patch_are_inverse_bit_for_bit(scan, tmp_path):
    base = drawn(shapes_of("two_tower", scan))
    base["image"]["norm"]["scale"][:2] = np.nan, 0.0
    base["image"]["norm"]["bias"][:2] = np.nan, -0.0
    tuned = jax.tree.map(np.copy, base)
    tuned["image"]["norm"]["scale"][1] = -0.0
    tuned["logit_scale"] = np.float32(np.nan)
    tuned["text"]["head"]["bias"].view(np.uint32)[0] = 0x7FA00001  # a signalling NaN with a payload
    blocks = tuned["text"]
    if scan:
        blocks["blocks"]["mlp"]["fc1"]["kernel"][0, 2, 3] = np.inf
        blocks["blocks"]["mlp"]["fc1"]["kernel"][1, 0, 0] = np.nan
    else:
        blocks["blocks_0"]["mlp"]["fc1"]["kernel"][2, 3] = np.inf
        blocks["blocks_1"]["mlp"]["fc1"]["kernel"][0, 0] = np.nan
    changed = diffs.diff(base, tuned)
    layer = "text/blocks/mlp/fc1/kernel[{}]" if scan else "text/blocks_{}/mlp/fc1/kernel"
    assert {name: value.shape for name, value in changed.items()} == {
        "image/norm/scale": (32,),
        "logit_scale": (),
        "text/head/bias": (OUT,),
        layer.format(0): (32, 64),
        layer.format(1): (32, 64),
    }
    before = bits(base)
    assert bits(diffs.patch(base, changed)) == bits(tuned) != before == bits(base)
    save_diff(tmp_path / "diff.safetensors", changed)
    loaded = load_diff(tmp_path / "diff.safetensors", shapes_of("two_tower", scan))
    assert bits(loaded) == bits(changed) and bits(diffs.patch(base, loaded)) == bits(tuned)
    assert diffs.diff(base, base) == {} and bits(diffs.patch(base, {})) == before


def test_a_diff_in_bfloat16_on_devices():
    base = {"blocks": {"w": jnp.zeros((2, 3), jnp.bfloat16)}, "b": jnp.ones((), jnp.bfloat16)}
    tuned = {"blocks": {"w": base["blocks"]["w"].at[1, 0].set(-0.0)}, "b": base["b"]}
    changed = diffs.diff(base, tuned)
    assert list(changed) == ["blocks/w[1]"]
    assert bits(diffs.patch(base, changed)) == bits(tuned)


STACK = {"blocks": {"w": np.zeros((2, 3), np.float32)}, "b": np.zeros(3, np.float32)}


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"c": np.zeros(3, np.float32)}, "the parameters have no `c`"),
        ({"b[0]": np.zeros((), np.float32)}, r"the parameters have no `b\[0\]`"),
        ({"b": np.zeros(4, np.float32)}, r"`b` is float32\[4\], in the model float32\[3\]"),
        ({"b": np.zeros(3, np.float16)}, r"`b` is float16\[3\], in the model float32\[3\]"),
        ({"blocks/w[1]": np.zeros(4, np.float32)}, r"`blocks/w\[1\]` is float32\[4\], in the model float32\[3\]"),
        ({"blocks/w[2]": np.zeros(3, np.float32)}, r"`blocks/w\[2\]` is beyond the 2 layers"),
    ],
)
def test_diffs_of_other_models(entries, message, tmp_path):
    with pytest.raises(UserError, match=message):
        diffs.patch(STACK, entries)
    save_diff(tmp_path / "diff.safetensors", entries)
    with pytest.raises(UserError, match=message) as error:
        load_diff(tmp_path / "diff.safetensors", STACK)
    assert "diff.safetensors" in str(error.value)
    with pytest.raises(UserError, match=r"`b` is float32\[3\] in one and float32\[4\] in another"):
        diffs.diff(STACK, STACK | {"b": np.zeros(4, np.float32)})


@pytest.mark.parametrize("share", [0.001, 0.3, 1.0])
def test_sparse_entries_come_back_bit_for_bit(share):
    """Places, a bit for each scalar, or all values: whichever is the smallest."""
    base = drawn(shapes_of("two_tower", True))
    rng = np.random.default_rng(0)
    change = lambda leaf: np.where(rng.random(leaf.shape) < share, leaf + 1, leaf).astype(leaf.dtype)
    for tuned in (jax.tree.map(change, base), jax.tree.map(lambda x: np.where(change(x) == x, x, -0.0), base)):
        changed = diffs.diff(base, tuned)
        packed = diffs.packed(changed, diffs.entries_of(base, changed))
        assert bits(diffs.patch(base, diffs.unpacked(packed, diffs.entries_of(base, changed)))) == bits(tuned)
        size = lambda tensors: sum(np.asarray(t).nbytes for t in tensors.values())
        moved = sum(int(np.sum(b != t)) for b, t in zip(*map(jax.tree.leaves, (base, tuned)), strict=True))
        assert size(packed) <= min(size(changed), 8 * moved + 64)
        forms = {name.rpartition("@")[2] for name in packed if "@" in name}
        assert forms & {"index", "bits"} == {"index" if share < 0.03 else "bits"} or share == 1


def test_deltas_add_up():
    """base + w_1 d_1 + w_2 d_2 against float64; one delta gives tuned; what was added is subtracted."""
    base, rng = drawn(shapes_of("two_tower", False)), np.random.default_rng(0)
    tuned = [jax.tree.map(lambda x: np.where(rng.random(x.shape) < 0.1, x + np.float32(0.5), x), base) for _ in "ab"]
    several = [diffs.deltas(base, one) for one in tuned]
    assert all(len(d.index) == len(d.value) > 0 and np.all(np.diff(d.index) > 0) for d in several[0].values())
    jax.tree.map(lambda got, w: np.testing.assert_allclose(got, w, atol=1e-6), diffs.plus(base, several[0]), tuned[0])
    found = diffs.plus(base, *several, weights=[2.0, -0.5])
    for got, b, one, two in zip(*map(jax.tree.leaves, (found, base, *tuned)), strict=True):
        b, one, two = map(np.float64, (b, one, two))
        np.testing.assert_allclose(got, b + 2 * (one - b) - 0.5 * (two - b), atol=1e-6)
    back = diffs.plus(diffs.plus(base, several[0]), several[0], weights=[-1])
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, atol=1e-6), back, base)
    assert bits(diffs.plus(base)) == bits(base)
    with pytest.raises(UserError, match="1 weights for 2 differences"):
        diffs.plus(base, *several, weights=[1.0])
    with pytest.raises(UserError, match="the difference of `other` is of another model"):
        diffs.plus(base, {"other": diffs.Sparse(np.zeros(1, int), np.ones(1))})
