"""A workdir becomes a model that names pictures."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import vlm_jax
from vlm_jax.params import sharding
from vlm_jax.run import checkpoint
from vlm_jax.run.program import TrainState


@pytest.fixture(scope="module")
def run(tmp_path_factory, two_tower):
    """A workdir with the parameters of an untrained model, and a picture."""
    workdir = tmp_path_factory.mktemp("run")
    params = two_tower.params
    saver = checkpoint.Checkpointer(workdir)
    saver.save(1, TrainState(step=jnp.int32(1), params=params, opt_state=(), ema=None), {})
    saver.close()
    checkpoint.write_json(workdir / "config.json", two_tower.config)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    Image.fromarray(pixels[0]).save(workdir / "picture.png")
    return workdir, two_tower.model, params, pixels


def test_load_embeds_as_the_model_does(run):
    workdir, model, params, pixels = run
    loaded = vlm_jax.load(workdir)
    embeddings = loaded.embed_images(list(pixels))
    assert embeddings.dtype == np.float32 and embeddings.shape == (5, 128)
    images = jnp.asarray(pixels, jnp.float32) / 127.5 - 1
    expected = jax.jit(model.apply)({"params": params}, images, None).image
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)
    np.testing.assert_allclose(loaded.embed_images(workdir / "picture.png"), expected[:1], atol=1e-5)


def test_classify_is_the_softmax_of_scaled_cosines(run):
    workdir, _, params, pixels = run
    loaded = vlm_jax.load(workdir)
    names = ["cat", "dog", "umbrella"]
    probabilities = loaded.classify(list(pixels), names, templates=["{}", "a {}"])
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-6)
    text = (loaded.embed_texts(names) + loaded.embed_texts([f"a {name}" for name in names])) / 2
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    logits = np.exp(params["logit_scale"]) * loaded.embed_images(list(pixels)) @ text.T
    np.testing.assert_allclose(probabilities, jax.nn.softmax(logits), atol=1e-5)


def test_a_mesh_and_a_batch_size_change_nothing(run):
    workdir, _, _, pixels = run
    loaded = vlm_jax.load(workdir)
    spread = dataclasses.replace(loaded, mesh=sharding.make_mesh(), batch_size=2)
    np.testing.assert_allclose(spread.embed_images(list(pixels)), loaded.embed_images(list(pixels)), atol=1e-5)


def test_parameters_are_restored_onto_the_mesh(run):
    workdir, _, params, pixels = run
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    loaded = vlm_jax.load(workdir, mesh=mesh)
    places = sharding.param_shardings(sharding.RULES, params, mesh)
    for leaf, alone, place in zip(*map(jax.tree.leaves, (loaded.params, params, places)), strict=True):
        assert leaf.sharding == place and np.array_equal(leaf, alone)
    assert sum(not leaf.is_fully_replicated for leaf in jax.tree.leaves(loaded.params)) > 10
    np.testing.assert_allclose(
        loaded.embed_images(list(pixels)), vlm_jax.load(workdir).embed_images(list(pixels)), atol=1e-5
    )


def test_what_is_no_run_is_named(tmp_path, run):
    with pytest.raises(vlm_jax.UserError, match=r"is no checkpoint: expected .* a workdir of vlm_jax.train, or a file"):
        vlm_jax.load(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(vlm_jax.UserError, match=r"holds checkpoints but no config.json of vlm_jax.train"):
        vlm_jax.load(tmp_path)
    with pytest.raises(vlm_jax.UserError, match="no image is given"):
        vlm_jax.load(run[0]).embed_images([])
