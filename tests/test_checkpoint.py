import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax import checkpoint, sharding
from vlm_jax.errors import UserError


def state_of(value):
    return {"step": jnp.int32(value), "params": {"a": jnp.full((8,), float(value))}, "ema": None}


def abstract(state, mesh):
    place = sharding.replicated(mesh)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state)


def test_the_newest_complete_checkpoint_is_restored(tmp_path):
    saver = checkpoint.Checkpointer(tmp_path, keep=2)
    for step in (1, 2, 3):
        saver.save(step, state_of(step), {"data": {"batch": step}})
    saver.close()
    (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir()  # a save that a kill cut short

    saver = checkpoint.Checkpointer(tmp_path, keep=2)
    assert saver.latest_step() == 3
    state, progress = saver.restore(abstract(state_of(0), sharding.make_mesh()))
    saver.close()
    assert int(state["step"]) == 3 and progress == {"data": {"batch": 3}}
    np.testing.assert_array_equal(state["params"]["a"], np.full(8, 3.0, np.float32))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdecimal()) == ["2", "3"]
    np.testing.assert_array_equal(checkpoint.load_params(tmp_path)["a"], np.full(8, 3.0, np.float32))


def test_another_model_is_named(tmp_path):
    saver = checkpoint.Checkpointer(tmp_path)
    saver.save(1, state_of(1), {})
    saver.wait()
    other = state_of(0) | {"params": {"b": jnp.zeros(3)}}
    with pytest.raises(UserError, match="checkpoint 1 does not fit the config"):
        saver.restore(abstract(other, sharding.make_mesh()))
    saver.close()


def test_params_sha256_sees_every_bit():
    params = {"a": np.zeros(3, np.float32), "b": np.ones(2, np.float32)}
    same = {"b": np.ones(2, np.float32), "a": np.zeros(3, np.float32)}
    negative = {"a": -np.zeros(3, np.float32), "b": np.ones(2, np.float32)}
    assert checkpoint.params_sha256(params) == checkpoint.params_sha256(same)
    assert checkpoint.params_sha256(params) != checkpoint.params_sha256(negative)


def test_a_workdir_belongs_to_one_config(tmp_path):
    path = tmp_path / "config.json"
    checkpoint.check_same_config(path, {"lr": 1.0, "data": {"uri": "a"}})
    checkpoint.check_same_config(path, {"lr": 1.0, "data": {"uri": "a"}})
    with pytest.raises(UserError, match=r"holds a run with config.data.uri = a, not b"):
        checkpoint.check_same_config(path, {"lr": 1.0, "data": {"uri": "b"}})
    assert json.loads(path.read_text())["data"]["uri"] == "a"


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.load_params(tmp_path)
