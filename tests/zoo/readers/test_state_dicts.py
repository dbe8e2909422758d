"""Names and averages of state dicts: wrappers and roots go, averages are chosen, nothing is dropped in silence."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest

from tests.support.torch_pickles import STATE, STORAGES, VIEWS
from tests.support.torch_writer import zip_bytes
from vlm_jax.errors import UserError
from vlm_jax.zoo.readers import state_dicts
from vlm_jax.zoo.readers.tensors import open_weights, write_safetensors

OWN = ("visual.proj", "ln_final.weight", "logit_scale")


def select(*names, **options):
    scalar = lambda name: name.rpartition(".")[2] in state_dicts.COUNTERS
    tensors = {name: SimpleNamespace(name=name, shape=() if scalar(name) else (2, 3)) for name in names}
    return {name: tensor.name for name, tensor in state_dicts.select(tensors, "a.pt", **options).items()}


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "_orig_mod.module.", "module._orig_mod.model.", "state_dict.model.module.",
     "model._forward_module._fsdp_wrapped_module.", "net.clip_model."],
)  # fmt: skip
def test_any_stack_of_known_prefixes_goes(prefix):
    assert select(*(prefix + name for name in OWN)) == {name: prefix + name for name in OWN}


def test_wrappers_go_from_the_middle_of_a_name():
    assert list(select("visual._orig_mod.blocks.0._checkpoint_wrapped_module.w", "b")) == ["visual.blocks.0.w", "b"]


def test_a_root_goes_from_the_names_that_have_it():
    """A scale beside the model of a trainer stays; one that most names lack is a name of the model's own."""
    assert list(select("model.a", "model.b", "logit_scale")) == ["a", "b", "logit_scale"]
    assert list(select("model.a", "b", "c")) == ["model.a", "b", "c"]


def test_names_that_coincide_are_refused():
    with pytest.raises(UserError, match=r"a.pt holds two tensors under the name `a`, one of them as `module.a`"):
        select("a", "module.a")


def test_averages_beside_the_weights(caplog):
    names = [f"{head}.{name}" for head in ("model", "ema_model") for name in OWN] + ["ema_model.num_updates"]
    with caplog.at_level(logging.WARNING):
        assert select(*names) == {name: f"model.{name}" for name in OWN}
    assert "a.pt holds averaged weights, too (ema_model); weights='ema' reads them" in caplog.text
    assert select(*names, weights="ema") == {name: f"ema_model.{name}" for name in OWN}
    assert select("n_averaged", *(f"module.{name}" for name in OWN), weights="ema").keys() == {*OWN}
    with pytest.raises(UserError, match=r"holds averaged weights alone \(`ema`\): pass weights='ema'"):
        select("ema.a", "ema.b", "optimizer.state")
    with pytest.raises(UserError, match="holds no averaged weights"):
        select(*OWN, weights="ema")
    with pytest.raises(UserError, match="weights is 'EMA'; expected 'ema'"):
        select(*OWN, weights="EMA")


def test_a_scalar_named_as_a_counter_stays_without_averages():
    assert list(select("step", "a")) == ["step", "a"]


def test_checkpoints_of_torch(tmp_path, caplog):
    path = tmp_path / "a.pt"
    averaged = {"_orig_mod.module.a": STATE["half"]}
    path.write_bytes(zip_bytes({"state_dict": {"module._orig_mod.a": STATE["whole"]}, "model_ema": averaged}, STORAGES))
    np.testing.assert_array_equal(open_weights(path).tensors["a"].read(), VIEWS["whole"])
    assert "averaged weights, too (model_ema)" in caplog.text
    np.testing.assert_array_equal(open_weights(path, "ema").tensors["a"].read(), VIEWS["half"])
    path.write_bytes(zip_bytes({"model_ema": averaged, "optimizer": {"state": STATE["cut"]}}, STORAGES))
    with pytest.raises(UserError, match="averaged weights alone"):
        open_weights(path)


def test_a_safetensors_file(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", {"_orig_mod.module.a": np.ones(3, np.float32)})
    assert list(open_weights(tmp_path / "a.safetensors").tensors) == ["a"]
