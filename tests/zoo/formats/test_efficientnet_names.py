"""The names of `efficientnet_lite_pytorch`; tests/golden/efficientnet.npz is a small network of theirs in torch."""

import types

import jax
import numpy as np
import pytest
from flax import traverse_util

from tests.support.paths import GOLDEN
from vlm_jax.data import ops
from vlm_jax.errors import UserError
from vlm_jax.models.efficientnet import LITE, EfficientNetLite, block_sizes, lookup
from vlm_jax.params.table import named_leaves
from vlm_jax.zoo import key_map
from vlm_jax.zoo.formats import efficientnet
from vlm_jax.zoo.readers.stored import Tensor

TINY = EfficientNetLite(width_multiplier=0.05, depth_multiplier=0.3, stem_width=8, head_width=48, out_dim=5)


def parameters(model):
    """Names and shapes of a two-tower's."""
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    return named_leaves({"image": jax.eval_shape(model.init, jax.random.key(0), images)["params"]})


def project_shapes(**multipliers):
    """What tells a variant: the shapes of the blocks' last convolutions, and of the stem."""
    blocks = block_sizes(**multipliers)
    shapes = {f"_blocks.{i}._project_conv.weight": (sizes.outputs, 8, 1, 1) for i, sizes in enumerate(blocks)}
    return {name: types.SimpleNamespace(shape=shape) for name, shape in shapes.items()} | {"_conv_stem.weight": None}


@pytest.fixture(scope="module")
def stored():
    with np.load(GOLDEN / "efficientnet.npz") as arrays:
        return dict(arrays)


def test_golden(stored):
    """Outputs agree with torch's, and the parameters go back into the same bits."""
    state = {name.removeprefix("state/"): a for name, a in stored.items() if name.startswith("state/")}
    tensors = {name: Tensor(a.shape, a.dtype, lambda index, a=a: a[index]) for name, a in state.items()}
    tensors["_bn0.num_batches_tracked"] = Tensor((), np.dtype(np.int64), lambda index: np.array(7))
    ours = parameters(TINY)
    plan = key_map.match(efficientnet.table(depth=8), ours, tensors, efficientnet.IGNORED, "the golden state")
    params = {}
    for name, (row,) in plan.items():
        shape = ours[name].shape
        params[name] = row.read(tensors[row.theirs], shape, [slice(None)] * len(shape))
        back = np.empty_like(state[row.theirs])
        row.write(params[name], back)
        np.testing.assert_array_equal(back.view(np.int32), state[row.theirs].view(np.int32))
    assert len(plan) == len(state)
    params = traverse_util.unflatten_dict(params, sep="/")["image"]
    logits = jax.jit(TINY.apply)({"params": params}, stored["image"])
    np.testing.assert_allclose(logits.pooled, stored["logits"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits.tokens, stored["tokens"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits.tokens.mean(1), stored["pooled"], rtol=1e-5, atol=1e-5)
    half = jax.jit(TINY.clone(dtype="bfloat16").apply)({"params": params}, stored["image"])
    error = np.linalg.norm(half.tokens.astype(np.float32) - stored["tokens"]) / np.linalg.norm(stored["tokens"])
    assert 1e-3 < error < 0.03  # 24 roundings to 8 bits: 2 ** -8 * 24 ** 0.5 is 0.02


@pytest.mark.parametrize("variant", LITE)
def test_settings(variant):
    tensors = project_shapes(**lookup(variant))
    settings = efficientnet.settings(tensors)
    assert settings["model"]["image"] == dict(type="efficientnet", variant=variant, out_dim=None)
    assert settings["model"]["text"] is settings["tokenizer"] is settings["tokenize"] is None
    with_head = efficientnet.settings(tensors | {"_fc.bias": types.SimpleNamespace(shape=(11,))})
    assert with_head["model"]["image"]["out_dim"] == 11
    size = LITE[variant][2]
    image = np.tile(np.array([127, 255, 0], np.uint8), (400, 500, 1))
    image = ops.parse(settings["preprocess"])({"image": image}, np.random.default_rng(0))["image"]
    assert image.shape == (size, size, 3)
    np.testing.assert_allclose(image[0, 0], [0, 1, -127 / 128], atol=1e-6)


def test_other_files():
    with pytest.raises(UserError, match=r"`_conv_stem.weight` and .* are not there"):
        efficientnet.settings({"visual.proj": None})
    with pytest.raises(UserError, match=r"of 8 blocks .* is no Lite variant; expected blocks: 16"):
        efficientnet.settings(project_shapes(width_multiplier=1.0, depth_multiplier=0.3))
    with pytest.raises(UserError, match="is of an EfficientNet B"):
        efficientnet.settings(project_shapes(**lookup("lite0")) | {"_blocks.0._se_reduce.weight": None})
