from pathlib import Path
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vlm_jax import objectives
from vlm_jax.errors import UserError
from vlm_jax.models import Embeddings
from vlm_jax.models.two_tower import EMBEDDINGS

GOLDEN = np.load(Path(__file__).parents[2] / "golden/losses.npz")
KEYS = jax.random.split(jax.random.key(0), 4)


class Lookup(nn.Module):
    """Embeddings are the inputs themselves, so that a loss can be compared with its formula."""

    bias: bool = True
    outputs: ClassVar = EMBEDDINGS

    @nn.compact
    def __call__(self, images, texts, *, train=False):
        scale = jnp.exp(self.param("logit_scale", nn.initializers.constant(np.log(10.0)), ()))
        bias = self.param("logit_bias", nn.initializers.constant(-2.5), ()) if self.bias else None
        return Embeddings(images, texts, None, None, scale, bias)


def build(bias=True, **section):
    """(objective, model)"""
    return objectives.build(dict(name="contrastive", **section), Lookup(bias)), Lookup(bias)


def params(log_scale=2.302585093, bias=-2.5):
    return {"logit_scale": jnp.float32(log_scale)} | ({} if bias is None else {"logit_bias": jnp.float32(bias)})


def value(objective, params, image, text, **batch):
    batch = {"image": image, "token_ids": text, **batch}
    loss, metrics = objectives.value(*objective, params, batch, None)
    return loss, {name.removeprefix("contrastive/"): metric for name, metric in metrics.items()}


@pytest.mark.parametrize("penalty, short", [("softmax", "dsoft"), ("sigmoid", "dsig")])
def test_values_and_gradients_are_the_published_ones(penalty, short):
    bias = -2.5 if penalty == "sigmoid" else None
    objective = build(bias=bias is not None, penalty=penalty)
    loss = lambda p, image, text: value(objective, p, image, text)[0]
    got, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(params(bias=bias), GOLDEN["z1"], GOLDEN["z2"])
    np.testing.assert_allclose(got, GOLDEN[penalty], rtol=1e-6)
    np.testing.assert_allclose(grads[1], GOLDEN[f"{short}0"], atol=1e-6)
    np.testing.assert_allclose(grads[2], GOLDEN[f"{short}1"], atol=1e-6)
    np.testing.assert_allclose(grads[0]["logit_scale"] / 10, GOLDEN[f"{short}2"], rtol=1e-5)  # there: d/d scale
    if bias is not None:
        np.testing.assert_allclose(grads[0]["logit_bias"], GOLDEN["dsig3"], rtol=1e-5)


def test_multi_positive_softmax_matches_its_formula():
    z = [jax.random.normal(key, (6, 4)) / 2 for key in KEYS[:2]]
    concept = np.array([0, 1, 0, 2, 0, 1])
    got = value(build(bias=False, targets="concept"), params(bias=None), *z, concept=concept)[0]
    x = 10 * np.asarray(z[0], np.float64) @ np.asarray(z[1], np.float64).T
    same = concept[:, None] == concept
    rows = -np.mean([(np.log(np.exp(r) / np.exp(r).sum())[s]).mean() for r, s in zip(x, same, strict=True)])
    columns = -np.mean([(np.log(np.exp(c) / np.exp(c).sum())[s]).mean() for c, s in zip(x.T, same, strict=True)])
    np.testing.assert_allclose(got, (rows + columns) / 2, rtol=1e-5)


def test_multi_positive_sigmoid_matches_its_formula():
    z = [jax.random.normal(key, (5, 4)) / 2 for key in KEYS[:2]]
    concept = np.array([0, 1, 0, 0, 1])
    got = value(build(penalty="sigmoid", targets="concept"), params(), *z, concept=concept)[0]
    x = 10 * np.asarray(z[0], np.float64) @ np.asarray(z[1], np.float64).T - 2.5
    sign = np.where(concept[:, None] == concept, 1, -1)
    np.testing.assert_allclose(got, np.log1p(np.exp(-sign * x)).sum(1).mean(), rtol=1e-5)


@pytest.mark.parametrize("penalty", ["softmax", "sigmoid"])
def test_distinct_labels_are_the_identity(penalty):
    z = GOLDEN["z1"], GOLDEN["z2"]
    plain = value(build(penalty=penalty), params(), *z)[0]
    labelled = value(build(penalty=penalty, targets="concept"), params(), *z, concept=np.arange(8)[::-1])[0]
    np.testing.assert_array_equal(plain, labelled)


def test_label_smoothing():
    z = GOLDEN["z1"], GOLDEN["z2"]
    smooth = build(penalty={"name": "softmax", "label_smoothing": 0.1})
    x = 10 * np.asarray(z[0], np.float64) @ np.asarray(z[1], np.float64).T
    target = 0.9 * np.eye(8) + 0.1 / 8
    log_p = lambda x: x - np.log(np.exp(x).sum(1, keepdims=True))
    want = -((target * log_p(x)).sum(1).mean() + (target * log_p(x.T)).sum(1).mean()) / 2
    np.testing.assert_allclose(value(smooth, params(), *z)[0], want, rtol=1e-5)


def test_metrics():
    image = jnp.eye(4)
    text = jnp.eye(4)[jnp.array([0, 1, 3, 3])]  # text 2 describes picture 3; texts 2 and 3 tie for it, so it is a miss
    loss, metrics = value(build(penalty="sigmoid"), params(), image, text)
    assert float(metrics["accuracy_image_to_text"]) == 0.5
    assert float(metrics["accuracy_text_to_image"]) == 0.75
    np.testing.assert_allclose([metrics["scale"], metrics["bias"], metrics["loss"]], [10, -2.5, loss], rtol=1e-6)
    collapsed = value(build(), params(), jnp.ones((4, 4)) / 2, jnp.ones((4, 4)) / 2)[1]
    assert float(collapsed["accuracy_image_to_text"]) == 0.0


def test_bfloat16_embeddings_give_fp32_logits():
    z = [GOLDEN[k].astype(jnp.bfloat16) for k in ("z1", "z2")]
    got = value(build(), params(), *z)[0]
    want = value(build(), params(), *[x.astype(np.float32) for x in z])[0]
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, want)


def test_max_scale_holds_but_does_not_trap():
    objective = build(bias=False, max_scale=100.0)
    grad = jax.jit(jax.grad(lambda p, *z: value(objective, p, *z)[0]))
    aligned, crossed = (jnp.eye(4), jnp.eye(4) + 0.005), (jnp.eye(4), jnp.eye(4)[::-1])
    p = params(np.log(150.0), None)
    np.testing.assert_allclose(value(objective, p, *crossed)[1]["scale"], 100.0)
    assert float(grad(p, *crossed)["logit_scale"]) > 0  # descent lowers it
    low = grad(params(np.log(2.0), None), *aligned)["logit_scale"]
    assert float(low) < 0 and float(grad(params(np.log(105.0), None), *aligned)["logit_scale"]) == 0.0


@pytest.mark.parametrize("penalty", ["softmax", "sigmoid"])
def test_every_device_sees_all_negatives(penalty):
    objective = build(penalty=penalty, targets="concept")
    batch = {"image": jnp.asarray(GOLDEN["z1"]), "token_ids": jnp.asarray(GOLDEN["z2"]), "concept": jnp.arange(8) // 2}
    step = jax.jit(lambda p, batch: objectives.value_and_grad(*objective, p, batch, jax.random.key(0))[:3])
    want = step(params(), batch)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    got = step(params(), sharded)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


@pytest.mark.parametrize(
    "section, message",
    [
        ({"name": "contrastve"}, "config.objective.name is `contrastve`"),
        ({"penalty": "sigmod"}, "config.objective.penalty is `sigmod`; expected one of: softmax, sigmoid"),
        ({"penalty": {"name": "softmax", "smoothing": 0.1}}, "no key `smoothing`; did you mean `label_smoothing`"),
        ({"target": "concept"}, "config.objective has no key `target`; did you mean `targets`"),
    ],
)
def test_mistakes_in_the_section_are_named(section, message):
    with pytest.raises(UserError, match=message):
        objectives.build({"name": "contrastive", **section}, Lookup())


def test_a_label_key_that_the_batch_lacks_is_named():
    with pytest.raises(UserError, match="`concept`, which the batch lacks; expected `identity` or one of: image"):
        value(build(targets="concept"), params(), GOLDEN["z1"], GOLDEN["z2"])
