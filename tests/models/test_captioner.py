"""The captioner against the reference arrays, and step by step with caches against all at once."""

from functools import partial

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.paths import GOLDEN
from vlm_jax import models, objectives
from vlm_jax.models.decoder import shift_right
from vlm_jax.zoo import key_map
from vlm_jax.zoo.formats import big_vision
from vlm_jax.zoo.load import read_params
from vlm_jax.zoo.readers.tensors import open_tensors


@pytest.fixture(scope="module", params=["cappa_loop", "cappa_scan"])
def golden(request):
    """(model, params, arrays)."""
    path = GOLDEN / f"{request.param}.npz"
    arrays = dict(np.load(path))
    tensors = big_vision.of_today(open_tensors(path).tensors)
    section, entries = big_vision.describe(tensors)
    scan = request.param == "cappa_scan"
    section = section | {part: section[part] | {"scan": scan} for part in ("image", "decoder")}
    model = models.build(section)
    shapes = jax.eval_shape(model.init, jax.random.key(0), arrays["image"], arrays["text"])["params"]
    like = flax.traverse_util.flatten_dict(shapes, sep="/")
    plan = key_map.match(entries, like, tensors, (), request.param)
    return model, flax.traverse_util.unflatten_dict(read_params(plan, like, tensors), sep="/"), arrays


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@partial(jax.jit, static_argnums=0)
def logits(model, params, images, inputs, **options):
    hidden = model.apply({"params": params}, images, inputs, method="hidden", **options)
    return model.apply({"params": params}, hidden, method="logits")


def test_logits(golden):
    model, params, arrays = golden
    images, text = arrays["image"], arrays["text"]
    context, mask = model.apply({"params": params}, images, method="encode")
    close(context, arrays["encoded"])
    assert mask is None
    close(jax.jit(model.apply)({"params": params}, images, text), arrays["ar_logits"])
    masked = jnp.full_like(text, model.decoder.vocab_size)
    close(logits(model, params, images, masked, bidirectional=jnp.ones(text.shape, bool)), arrays["parallel_logits"])


@pytest.mark.parametrize(("rate", "loss"), [(0.0, "ar_loss"), (1.0, "parallel_loss")])
def test_loss(golden, rate, loss):
    model, params, arrays = golden
    section = dict(name="captioning", corruption=dict(name="parallel", rate=rate), chunk=5)
    objective = objectives.build(section, model)
    batch = {"image": jnp.asarray(arrays["image"]), "token_ids": jnp.asarray(arrays["text"])}
    value, _, _, features = jax.jit(partial(objectives.value_and_grad, objective, model))(
        params, batch, jax.random.key(0)
    )
    close(value, arrays[loss])
    if rate == 0:
        close(features["batch"]["captioning"]["log_likelihood"], arrays["score"])


@pytest.mark.parametrize("step", [1, 3])
def test_cached_steps_are_the_whole(golden, step):
    """Any number of tokens at a time gives the logits of all at once."""
    model, params, arrays = golden
    images, inputs = arrays["image"], shift_right(jnp.asarray(arrays["text"]))[:, :9]
    want = logits(model, params, images, inputs)
    context, _ = model.apply({"params": params}, images, method="encode")
    caches = model.decoder.new_caches(len(images), inputs.shape[1])

    @jax.jit
    def decode(inputs, context, caches, position):
        decoded = model.apply({"params": params}, inputs, context, caches=caches, position=position, method="decode")
        return model.apply({"params": params}, decoded.hidden, method="logits"), decoded.caches

    for first in range(0, inputs.shape[1], step):
        got, caches = decode(inputs[:, first : first + step], context, caches, first)
        context = None
        close(got, want[:, first : first + step])


def test_a_position_sees_what_it_may(golden):
    """Changing input j moves the hidden states of positions >= j, and where it is bidirectional those of all."""
    model, params, arrays = golden
    images, inputs = arrays["image"][:1], shift_right(jnp.asarray(arrays["text"]))[:1]
    shown = jnp.zeros(inputs.shape, bool).at[0, 2].set(True)
    run = lambda inputs: logits(model, params, images, inputs, bidirectional=shown)[0]
    moved = lambda j: np.abs(run(inputs) - run(inputs.at[0, j].add(1))).max(-1) > 0
    np.testing.assert_array_equal(moved(4), np.arange(16) >= 4)
    assert moved(2).all()
