"""Untrained models of the configs' smallest size, shared by the evaluators' tests."""

import jax
import jax.numpy as jnp
import pytest

from configs import cappa, clip
from vlm_jax import config, models
from vlm_jax.data import tokenizers
from vlm_jax.pretrained import Pretrained


def untrained(settings):
    settings = config.plain(settings)
    model = models.build(settings["model"])
    length = (model.decoder if hasattr(model, "decoder") else model.text).length
    texts = jnp.zeros((1, length), jnp.int32)
    given = texts if settings["preprocess"] is None else jnp.zeros((1, 32, 32, 3))
    params = jax.jit(model.init)(jax.random.key(0), given, texts)
    tokenizer = tokenizers.build(settings["tokenizer"])
    return Pretrained(model, params["params"], tokenizer, settings["preprocess"], settings["tokenize"], settings)


def partial_to_some_tokens(settings):
    """Untrained, with a head that prefers some tokens, so that texts end."""
    pretrained = untrained(settings)
    head = pretrained.params["head"]
    head["kernel"] = 0.5 * jax.random.normal(jax.random.key(1), head["kernel"].shape)
    return pretrained


@pytest.fixture(scope="session")
def captioner():
    return partial_to_some_tokens(cappa.get_config("smoke"))


@pytest.fixture(scope="session")
def two_tower():
    return untrained(clip.get_config("smoke"))
