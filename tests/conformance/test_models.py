"""What every model has to do: it enters by being declared, with a tiny section in tests/support/models.py."""

import functools

import jax
import numpy as np
import pytest

import vlm_jax
from tests.support.models import run, section, tiny
from vlm_jax import catalogue, models
from vlm_jax.data import tokenizers
from vlm_jax.errors import UserError
from vlm_jax.params import sharding
from vlm_jax.params.table import named_leaves
from vlm_jax.pretrained import Pretrained

MODELS = catalogue.of("models")


@pytest.mark.parametrize("name", MODELS)
def test_it_comes_back_from_its_file(name, tmp_path):
    known = tiny(name, True)
    settings = dict(model=section(name, True), tokenizer="emoji")
    preprocess = None if name in ("encoder_decoder", "prefix_lm") else "decode | resize(16) | normalize"
    pretrained = Pretrained(known.model, known.params, tokenizers.build("emoji"), preprocess, "tokenize(8)", settings)
    vlm_jax.save_pretrained(pretrained, tmp_path / "model")
    again = vlm_jax.load(tmp_path / "model")
    for leaf, want in named_leaves(known.params).items():
        np.testing.assert_array_equal(named_leaves(again.params)[leaf], want, err_msg=leaf)


@pytest.mark.parametrize("name", MODELS)
def test_eight_devices_compute_what_one_does(name):
    known = tiny(name, True)
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    place = sharding.param_shardings(sharding.RULES, known.params, mesh)
    with jax.set_mesh(mesh):
        spread = run(known.model, jax.device_put(known.params, place), *known.inputs)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
    jax.tree.map(close, spread, known.apply())


@pytest.mark.parametrize("name", MODELS)
def test_a_mistyped_key_is_named(name):
    with pytest.raises(UserError, match="nonsense") as error:
        models.build(section(name) | {"nonsense": 1})
    assert "\n" not in str(error.value)
