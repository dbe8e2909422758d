import json
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from vlm_jax.errors import UserError
from vlm_jax.params import sharding
from vlm_jax.run import checkpoint


def state_of(value):
    return {"step": jnp.int32(value), "params": {"a": jnp.full((8,), float(value))}, "ema": None}


def noise(step):
    return state_of(step) | {"params": {"a": jax.random.normal(jax.random.key(step), (64, 1024))}}


def abstract(state, mesh):
    """The target of `restore`, of any step."""
    place = sharding.replicated(mesh)
    tree = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state)
    return lambda step: tree


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


DAMAGE = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "gone": lambda path: path.unlink(),
    "one bit": lambda path: path.write_bytes(flipped(path.read_bytes())),
    "progress": lambda path: (path.parents[3] / "progress" / "metadata").write_text('{"data": {"ba'),
    "metadata": lambda path: (path.parents[2] / "_METADATA").write_bytes(b"\x9e"),
}


def flipped(data):
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(how, tmp_path, caplog):
    saver = checkpoint.Checkpointer(tmp_path, keep=3)
    for step in (1, 2):
        saver.save(step, noise(step), {"data": {"batch": step}})
    saver.close()
    files = (tmp_path / "checkpoints" / "2" / "state").glob("ocdbt.process_0/d/*")
    DAMAGE[how](max(files, key=lambda path: path.stat().st_size))

    saver = checkpoint.Checkpointer(tmp_path, keep=3)
    state, progress = saver.restore(abstract(noise(0), sharding.make_mesh()))
    assert int(state["step"]) == 1 and progress == {"data": {"batch": 1}}
    np.testing.assert_array_equal(state["params"]["a"], noise(1)["params"]["a"])
    (warning,) = [text for text in caplog.messages if "damaged" in text]
    assert "checkpoint 2 is damaged (" in warning and "taking the one before" in warning
    saver.save(2, noise(2), {})  # the step comes again
    saver.close()
    assert checkpoint.Checkpointer(tmp_path).restore(abstract(noise(0), sharding.make_mesh()))[0]["step"] == 2
    assert (tmp_path / "checkpoints" / "damaged-2").is_dir()


def test_a_step_may_be_damaged_twice(tmp_path):
    for _ in range(2):
        saver = checkpoint.Checkpointer(tmp_path, keep=3)
        for step in (1, 2):
            if step not in saver._manager.all_steps():
                saver.save(step, state_of(step), {})
        saver.wait()
        (tmp_path / "checkpoints" / "2" / "progress" / "metadata").unlink()
        assert int(saver.restore(abstract(state_of(0), sharding.make_mesh()))[0]["step"]) == 1
        saver.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "damaged-2", "damaged-2-2"]


def test_no_room_on_a_device_damages_no_checkpoint(tmp_path, monkeypatch):
    saver = checkpoint.Checkpointer(tmp_path)
    saver.save(1, state_of(1), {})
    saver.wait()

    def no_room(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.ocp.StandardCheckpointHandler, "restore", no_room)
        with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
            saver.restore(abstract(state_of(0), sharding.make_mesh()))
    assert int(saver.restore(abstract(state_of(0), sharding.make_mesh()))[0]["step"]) == 1
    saver.close()


def test_without_a_whole_checkpoint_the_run_does_not_begin_anew(tmp_path):
    saver = checkpoint.Checkpointer(tmp_path)
    saver.save(1, state_of(1), {})
    saver.wait()
    (tmp_path / "checkpoints" / "1" / "progress" / "metadata").unlink()
    with pytest.raises(UserError, match=r"none of the checkpoints \[1\] in .* can be read; move them away"):
        saver.restore(abstract(state_of(0), sharding.make_mesh()))
    saver.close()
    assert (tmp_path / "checkpoints" / "1").is_dir()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_state_goes_to_any_mesh_and_dtype(dtype, tmp_path):
    """From shards to shards: no device, and no process, has more than its own."""
    kernel = jnp.arange(64.0 * 32).reshape(64, 32) / 100
    rules = {(8, 1): P("fsdp", None), (2, 4): P("fsdp", "tensor"), (1, 2): P(None, "tensor"), (1, 1): P()}
    saver = checkpoint.Checkpointer(tmp_path)
    for step, ((fsdp, tensor), spec) in enumerate(rules.items(), 1):
        mesh = sharding.make_mesh(1, fsdp, tensor, jax.devices()[: fsdp * tensor])
        place = jax.sharding.NamedSharding(mesh, spec)
        if step > 1:
            target = {"kernel": jax.ShapeDtypeStruct(kernel.shape, dtype, sharding=place)}
            state, _ = saver.restore(lambda step, target=target: target)
            assert state["kernel"].sharding == place and state["kernel"].dtype == dtype
            shard = (64 // fsdp, 32 // tensor)
            assert {one.data.shape for one in state["kernel"].addressable_shards} == {shard}
            np.testing.assert_array_equal(state["kernel"], kernel.astype(dtype))
        saver.save(step, {"kernel": jax.device_put(kernel, place)}, {})
        saver.wait()
    saver.close()


def test_checksum_is_of_every_bit_and_no_mesh():
    mesh = sharding.make_mesh(1, 8)
    state = {"a": jnp.arange(16.0), "b": jnp.zeros((8, 2), jnp.bfloat16), "c": jnp.array([True, False])}
    split = jax.device_put(state["a"], jax.sharding.NamedSharding(mesh, P("fsdp")))
    assert checkpoint.checksum(state) == checkpoint.checksum(state | {"a": split})
    for other in ({"a": state["a"].at[3].set(3.0000002)}, {"b": -state["b"]}, {"c": jnp.array([True, True])}):
        assert checkpoint.checksum(state) != checkpoint.checksum(state | other)
    swapped = {"a": jnp.ones(2), "b": jnp.zeros(2)}, {"a": jnp.zeros(2), "b": jnp.ones(2)}
    assert checkpoint.checksum(swapped[0]) != checkpoint.checksum(swapped[1])


def test_a_full_disk_is_named_and_the_last_good_checkpoint_stays(tmp_path):
    saver = checkpoint.Checkpointer(tmp_path)
    saver.save(1, noise(1), {})
    saver.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))  # what is written beyond 64 KiB fails
    try:
        with pytest.raises(
            UserError, match=r"can be written to .* \(File too large\); that of step 1 is whole. Make room"
        ):
            saver.save(2, noise(2), {})
            saver.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    saver = checkpoint.Checkpointer(tmp_path)
    state, _ = saver.restore(abstract(noise(0), sharding.make_mesh()))
    np.testing.assert_array_equal(state["params"]["a"], noise(1)["params"]["a"])
    saver.save(2, noise(2), {})
    saver.close()
    assert saver.latest_step() == 2


def test_another_model_is_named(tmp_path):
    saver = checkpoint.Checkpointer(tmp_path)
    saver.save(1, state_of(1), {})
    saver.wait()
    wrong = {
        r"`params/a` has the shape \(8,\) in the checkpoint, none in the config": {"b": jnp.zeros(3)},
        r"`params/a` has the shape \(8,\) in the checkpoint, \(3,\) in the config": {"a": jnp.zeros(3)},
    }
    for message, params in wrong.items():
        with pytest.raises(UserError, match=f"checkpoint 1 does not fit the config's .*: {message}"):
            saver.restore(abstract(state_of(0) | {"params": params}, sharding.make_mesh()))
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
