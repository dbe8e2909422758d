"""The contrastive objective over blocks and around a ring equals the objective that holds all logits."""

from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vlm_jax import objectives
from vlm_jax.errors import UserError
from vlm_jax.models import Embeddings
from vlm_jax.models.two_tower import EMBEDDINGS

SIZE, WIDTH = 48, 16


class Lookup(nn.Module):
    """Embeddings are rows of tables, so that parameters' gradients are the embeddings'."""

    outputs: ClassVar = EMBEDDINGS

    @nn.compact
    def __call__(self, images, texts, *, train=False):
        table = lambda name: self.param(name, nn.initializers.zeros, (SIZE, WIDTH))
        row = lambda name, ids: None if ids is None else table(name)[ids]
        scale = jnp.exp(self.param("logit_scale", nn.initializers.zeros, ()))
        bias = self.param("logit_bias", nn.initializers.zeros, ())
        return Embeddings(row("image", images), row("text", texts), None, None, scale, bias)


def params():
    rng = np.random.default_rng(0)
    unit = lambda x: (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    image = rng.normal(size=(SIZE, WIDTH))
    text = image + rng.normal(size=(SIZE, WIDTH))
    return {"image": unit(image), "text": unit(text), "logit_scale": np.float32(2.3), "logit_bias": np.float32(-2.5)}


PARAMS, IDS = params(), np.arange(SIZE)
BATCH = {"image": IDS, "token_ids": IDS, "concept": IDS % 31}
PENALTIES = ("softmax", "sigmoid", {"name": "softmax", "label_smoothing": 0.1})


def run(batch, params=PARAMS, accumulate=1, **section):
    """(loss, metrics, gradients)"""
    objective = objectives.build(dict(name="contrastive", **section), Lookup())
    step = partial(objectives.value_and_grad, objective, Lookup(), rng=None, accumulate=accumulate)
    return jax.jit(lambda params, batch: step(params, batch)[:3])(params, batch)


def assert_close(got, want):
    """To 5e-6: the scale's gradient is ten times a difference of numbers near 1."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=5e-6), got, want)


@pytest.mark.parametrize("targets", ["identity", "concept"])
@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_blocks_and_the_plain_form_agree(penalty, targets):
    section = dict(penalty=penalty, targets=targets)
    want = run(BATCH, **section)
    assert want[1]["contrastive/accuracy_image_to_text"] > 0.3
    assert_close(run(BATCH, **section, implementation="blockwise"), want)


@pytest.mark.parametrize("penalty", PENALTIES[:2])
def test_around_a_ring(penalty):
    """Micro-batches included."""
    want = run(BATCH, penalty=penalty, targets="concept")
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    batch = jax.device_put(BATCH, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    with jax.set_mesh(mesh):
        assert_close(run(batch, penalty=penalty, targets="concept", accumulate=2), want)


@pytest.mark.parametrize("targets", ["identity", "concept"])
@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_masked_examples_do_not_exist(penalty, targets):
    """Whatever they hold."""
    section = dict(penalty=penalty, targets=targets)
    valid = IDS % 4 > 0
    want = run({key: value[valid] for key, value in BATCH.items()}, **section)
    others = PARAMS | {name: np.where(valid[:, None], PARAMS[name], 9) for name in ("image", "text")}
    got = run(BATCH | {"valid": valid}, others, **section, mask="valid", implementation="blockwise")
    assert_close(got, want)
    assert not any(np.any(got[2][name][~valid]) for name in ("image", "text"))


def test_a_mask_that_the_batch_lacks_is_named():
    with pytest.raises(UserError, match=r"config\.objective\.mask is `valid`, which the batch lacks"):
        run(BATCH, mask="valid")
