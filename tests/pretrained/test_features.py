"""Tokens of chosen layers, for pictures and for texts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.models import tiny
from vlm_jax import UserError
from vlm_jax.pretrained import Pretrained

PIXELS = list(np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8))
TEXTS = ["grinning face", "dog"]


def test_features_are_the_outputs_of_blocks(two_tower):
    found = dataclasses.replace(two_tower, batch_size=2).features(PIXELS, layers=[0, -1])
    images = jnp.asarray(np.stack(PIXELS), jnp.float32) / 127.5 - 1
    tower = two_tower.model.image
    want = jax.jit(lambda params: tower.apply({"params": params}, images, layers=(0, tower.depth - 1)))
    for tokens, expected in zip(found, want(two_tower.params["image"]).aux["layers"], strict=True):
        assert tokens.dtype == np.float32 and tokens.shape == expected.shape
        np.testing.assert_allclose(tokens, expected, atol=1e-5)


def test_features_of_texts(two_tower):
    (tokens,) = two_tower.features(texts=TEXTS, layers=[-1])
    norm = two_tower.params["text"]["norm"]
    token_ids = two_tower._token_ids(TEXTS)
    want = jax.jit(lambda params: two_tower.model.text.apply({"params": params}, token_ids).tokens)
    scaled = (tokens - tokens.mean(-1, keepdims=True)) / np.sqrt(tokens.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(scaled * norm["scale"] + norm["bias"], want(two_tower.params["text"]), atol=1e-4)


def letters(texts, length, **_):
    """Tokens of a small vocabulary: letters, and padding."""
    rows = [[ord(letter) % 13 + 1 for letter in text[:length]] for text in texts]
    return np.array([row + [0] * (length - len(row)) for row in rows], np.int32)


def test_features_of_a_coca():
    coca = tiny("coca", True)
    pretrained = Pretrained(coca.model, coca.params, letters, "normalize", "tokenize(8)")
    tokens = pretrained.features([picture[:16, :16] for picture in PIXELS], layers=[0, 1])
    assert [array.shape for array in tokens] == [(5, 4, 32)] * 2
    assert pretrained.features(texts=TEXTS)[0].shape == (2, 9, 32)  # the cls token last


def test_what_has_no_features_says_so(two_tower, captioner):
    with pytest.raises(UserError, match=r"features\(images, \.\.\.\) or features\(texts=texts, \.\.\.\)"):
        two_tower.features(layers=[0])
    with pytest.raises(UserError, match=r"numbers of blocks, such as \[3, -1\]; got -1"):
        two_tower.features(PIXELS, layers=-1)
    with pytest.raises(UserError, match="layers asks for block 99"):
        two_tower.features(PIXELS, layers=[99])
    with pytest.raises(UserError, match="this model has no text tower"):
        captioner.features(texts=TEXTS)
