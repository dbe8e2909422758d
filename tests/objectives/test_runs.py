"""A run with a queue, teachers and parts of terms: what its workdir holds, what others read of it, how it goes on."""

import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import vlm_jax
from tests.support.pictures import write_pictures
from tests.support.runs import on_pictures
from vlm_jax.params.table import named_leaves
from vlm_jax.run import checkpoint
from vlm_jax.train import train
from vlm_jax.zoo import recognize

TEACHER = "pkg:vlm_jax/zoo/clip_tiny"
OWN = {"objective/feature_distillation/image_embedding/kernel", "objective/feature_distillation/image_embedding/bias"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(settings, workdir, results) of three steps."""
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder, 32)
    sizes = dict(width=32, depth=1, heads=2, mlp_dim=64, out_dim=16)
    settings = on_pictures(folder) | dict(
        model=dict(image=dict(sizes, patch=8), text=dict(sizes, vocab_size=2985, length=8, pool="mean")),
        objective=dict(
            terms=dict(
                contrastive=dict(negatives=dict(name="queue", size=32)),
                feature_distillation=dict(
                    teacher="tiny", of=["image_embedding"], weight=dict(value=0.5, begin="1 step")
                ),
            ),
            teachers=dict(momentum=dict(decay=0.9), tiny=dict(spec=TEACHER)),
        ),
        duration="3 steps",
        ema=0.9,
        checkpoint=dict(every="1 steps", keep=3),
        log=dict(every="1 steps", tensorboard=False),
    )
    workdir = tmp_path_factory.mktemp("runs") / "run"
    return settings, workdir, train(settings, workdir)


def saved(workdir, step=3):
    """{name: shape} of a checkpoint."""
    handler = ocp.StandardCheckpointHandler()
    leaves = named_leaves(handler.metadata(workdir / "checkpoints" / str(step) / "state"))
    handler.close()
    return {name: tuple(leaf.shape) for name, leaf in leaves.items()}


def test_a_checkpoint_holds_memories_and_averages_and_no_frozen_teacher(run):
    names = saved(run[1])
    for part in ("params", "ema", "objective_state/teachers/momentum"):
        assert {name for name in names if name.startswith(f"{part}/objective/")} == {f"{part}/{name}" for name in OWN}
    assert names["objective_state/terms/contrastive/key_text"] == (32, 16)
    teacher = named_leaves(vlm_jax.load(TEACHER).params)
    assert not any(
        "tiny" in name or shape == teacher["image/blocks_0/mlp/fc1/kernel"].shape for name, shape in names.items()
    )


@pytest.mark.parametrize("read", ["load", "load_on_a_mesh", "load_params", "understand"])
def test_what_belongs_to_terms_is_no_part_of_the_model(run, read):
    _, workdir, _ = run
    match read:
        case "load":
            names = named_leaves(vlm_jax.load(workdir).params)
        case "load_on_a_mesh":
            mesh = vlm_jax.params.sharding.make_mesh(data=4, fsdp=2)
            names = named_leaves(vlm_jax.load(workdir, mesh=mesh).params)
        case "load_params":
            names = named_leaves(checkpoint.load_params(workdir))
        case "understand":
            names = recognize.understand(workdir).tensors
    assert "image/patch_embed/kernel" in names and not any("objective" in name for name in names)


def test_an_export_has_the_model_alone(run, tmp_path):
    _, workdir, _ = run
    vlm_jax.save_pretrained(vlm_jax.load(workdir), tmp_path / "export")
    exported, own = (named_leaves(vlm_jax.load(path).params) for path in (tmp_path / "export", workdir))
    assert exported.keys() == own.keys()
    for name, leaf in own.items():
        np.testing.assert_array_equal(exported[name], leaf)


def test_a_run_goes_on_bit_for_bit(run, tmp_path):
    """From its second step: queue, averages and parts are restored, the frozen teacher is read again."""
    settings, workdir, results = run
    shutil.copytree(workdir, tmp_path / "run")
    for name in ("checkpoints/3", "results.json"):
        path = tmp_path / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = train(settings, tmp_path / "run")
    assert again["params_sha256"] == results["params_sha256"]
    both = [_state(path) for path in (tmp_path / "run", workdir)]
    jax.tree.map(np.testing.assert_array_equal, *both)
    lines = [line for line in (workdir / "metrics.jsonl").read_text().splitlines() if "contrastive/loss" in line]
    assert len(lines) == 3 and "feature_distillation/image_embedding" in lines[-1]


def _state(workdir):
    with ocp.StandardCheckpointer() as reader:
        return jax.tree.map(np.asarray, reader.restore(workdir / "checkpoints" / "3" / "state"))
