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
