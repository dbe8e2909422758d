"""Modules that begin where an earlier adaptation ended: its parameters, for its model alone."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.support.few_shot import pictures, tuned
from vlm_jax.adapt.modules.lora import lora
from vlm_jax.adapt.modules.started import pretrained_modules
from vlm_jax.adapt.recipe import Masked
from vlm_jax.errors import UserError
from vlm_jax.zoo.adapters import save_adapter


def test_it_begins_where_the_file_ended(base, tmp_path):
    first = tuned(base, lora(base.model, rank=2), pictures())
    save_adapter(tmp_path / "a.safetensors", base, first)
    recipe = pretrained_modules(base.model, start=str(tmp_path / "a.safetensors"))
    again = tuned(base, recipe, pictures(), learning_rate=0.0)
    assert again.model.insertions == first.model.insertions
    jax.tree.map(np.testing.assert_array_equal, again.params, first.params)
    other = dataclasses.replace(base, params=jax.tree.map(lambda leaf: leaf + 1, base.params))
    with pytest.raises(UserError, match="is of another model: load the one that it was made from"):
        tuned(other, recipe, pictures())
    save_adapter(tmp_path / "b.safetensors", base, tuned(base, Masked("bias"), pictures()))
    with pytest.raises(UserError, match="changes more than inserted modules"):
        tuned(base, pretrained_modules(base.model, start=str(tmp_path / "b.safetensors")), pictures())
