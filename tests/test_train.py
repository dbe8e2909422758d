"""The trainer: the same run on any mesh, killed and continued, with any accumulation; errors in one line."""

import json
import re
import signal
import time

import jax
import numpy as np
import pytest

from configs import clip
from tests.support.pictures import write_pictures
from tests.support.runs import lines, on_pictures, start
from vlm_jax.config import plain
from vlm_jax.data.files import write_json
from vlm_jax.errors import UserError
from vlm_jax.params import sharding
from vlm_jax.run.checkpoint import load_params
from vlm_jax.run.folder import locked
from vlm_jax.run.program import Program, build_program
from vlm_jax.train import train


def towers(bias_init=None):
    tower = dict(width=32, depth=2, heads=4, out_dim=16, scan=True)
    return dict(
        image=dict(patch=8, pool="gap", **tower),
        text=dict(vocab_size=64, length=8, pool="last", **tower),
        bias_init=bias_init,
    )


def random_batches(count, size):
    rng = np.random.default_rng(0)
    for _ in range(count):
        image = rng.normal(size=(size, 16, 16, 3)).astype(np.float32)
        yield {"image": image, "token_ids": rng.integers(1, 64, (size, 8)).astype(np.int32)}


def build(mesh, penalty, batch, steps=20, accumulate=1, size=16):
    return build_program(
        batch,
        size,
        mesh,
        lambda length: steps if length == "100%" else int(length),
        model=towers(bias_init=-10.0 if penalty == "sigmoid" else None),
        objective=dict(name="contrastive", penalty=penalty),
        optimizer=dict(name="adamw", lr=1e-3, weight_decay=0.1, clip_norm=1.0),
        partition=sharding.RULES,
        accumulate=accumulate,
        ema=0.99,
        seed=0,
    )


def loss_curve(mesh, penalty, accumulate=1, steps=20, size=16):
    """(losses of the first of 20 steps, the state after them)."""
    batches = list(random_batches(steps, size))
    program = build(mesh, penalty, batches[0], accumulate=accumulate, size=size)
    with jax.set_mesh(mesh):
        state = program.init(jax.random.key(0), {})
    step, losses = program.compile_step(), []
    for batch in batches:
        state, metrics, _ = step(state, sharding.to_global(batch, mesh, size), {})
        losses.append(float(metrics["loss"]))
    return np.array(losses), state


@pytest.mark.parametrize("penalty, shapes", [("softmax", ((8, 1, 1), (2, 4, 1), (2, 2, 2))), ("sigmoid", ((2, 2, 2),))])
def test_same_curve_on_every_mesh(penalty, shapes):
    one = sharding.make_mesh(devices=jax.devices()[:1])
    expected, _ = loss_curve(one, penalty)
    assert expected[-1] < expected[0]
    for shape in shapes:
        losses, state = loss_curve(sharding.make_mesh(*shape), penalty)
        np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5, err_msg=str(shape))
    kernel = state.params["image"]["blocks"]["mlp"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 16, 64)  # (2, 32, 128) over fsdp=2 x tensor=2
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == (2, 32, 128)]
    assert moments and all(leaf.sharding == kernel.sharding for leaf in moments)


def test_a_sharded_batch_goes_around_the_ring():
    (batch,) = random_batches(1, 16)
    for mesh, ring in ((sharding.make_mesh(2, 2, 2), True), (sharding.make_mesh(devices=jax.devices()[:1]), False)):
        lowered = build(mesh, "softmax", batch).lower_step()
        assert ("collective_permute" in lowered.as_text()) == ring


def test_accumulation_on_a_mesh_keeps_the_curve():
    mesh = sharding.make_mesh(2, 2, 2)
    expected, _ = loss_curve(mesh, "softmax", steps=5)  # the program of the test above
    losses, _ = loss_curve(mesh, "softmax", steps=5, accumulate=4)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def finish(process):
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def kill_when(process, condition):
    while process.poll() is None and not condition():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()


QUICK = ("--config.evals={}", "--config.batch_size=16")
OVERRIDES = {
    "plain": QUICK,
    "workers and accumulate": (*QUICK, "--config.data.workers=2", "--config.accumulate=2"),
}


@pytest.mark.subprocess
@pytest.mark.parametrize("kind", OVERRIDES)
def test_killed_and_continued_gives_the_same_parameters(kind, tmp_path):
    overrides = OVERRIDES[kind]
    code, errors = finish(start(tmp_path / "whole", *overrides))
    assert code == 0, errors
    workdir = tmp_path / "killed"
    checkpoints = workdir / "checkpoints"
    saved = lambda: {path.name for path in checkpoints.iterdir()} if checkpoints.exists() else set()
    moments = {
        "plain": [lambda: len(saved()) >= 1],  # while the first checkpoint is written
        "workers and accumulate": [lambda: len(lines(workdir)) >= 1, lambda: len(lines(workdir)) >= 4],  # before, after
    }
    for moment in moments[kind]:
        kill_when(start(workdir, *overrides), moment)
    code, errors = finish(start(workdir, *overrides))
    assert code == 0, errors
    whole, killed = (json.loads((path / "results.json").read_text()) for path in (tmp_path / "whole", workdir))
    assert killed["params_sha256"] == whole["params_sha256"]
    assert [line["step"] for line in lines(workdir)] == [line["step"] for line in lines(tmp_path / "whole")]


@pytest.mark.subprocess
def test_sigterm_saves_and_the_run_continues(tmp_path):
    process = start(tmp_path)
    while process.poll() is None and not lines(tmp_path):
        time.sleep(0.01)
    process.terminate()
    code, errors = finish(process)
    assert code == 1 and "SIGTERM: saved step" in errors
    assert "Traceback" not in errors
    step = int(errors.split("saved step ")[1].split()[0])
    assert (tmp_path / "checkpoints" / str(step)).is_dir()


def smoke():
    return clip.get_config("smoke")


WRONG = {
    "mistyped key": (lambda c: c.optimizer.update(lrr=1.0), r"config.optimizer.* has no key `lrr`"),
    "mistyped section": (
        lambda c: c.update(optimiser={}),
        r"config has no key `optimiser`; did you mean `optimizer`\?",
    ),
    "mistyped model key": (lambda c: c.model.image.update(widht=1), r"config.model.image has no key `widht`.*`width`"),
    "unknown penalty": (lambda c: c.objective.update(penalty="hinge"), r"penalty is `hinge`; expected one of: softmax"),
    "large batch": (lambda c: c.update(batch_size=1_000_000), r"fewer than batch_size=1000000"),
    "odd batch": (lambda c: c.update(batch_size=65), r"batch_size 65 cannot be split over 8 devices"),
    "rule for nothing": (
        lambda c: c.optimizer.update(params=((r"image/.*", dict(lr=0.1)), ("txt/.*", dict()), (".*", dict()))),
        r"config.optimizer.params: the rule `txt/.\*` matches no parameter",
    ),
    "parameter without a rule": (
        lambda c: c.update(partition=((r"image/.*", ()),)),
        r"config.partition: no rule matches `logit_scale`",
    ),
    "missing shard": (lambda c: c.data.update(uri="wds:/nowhere/{000..001}.tar", split=None), r"/nowhere/000.tar"),
    "unknown op": (lambda c: c.data.update(ops="decode | flop"), r"there is no op `flop`; did you mean `flip`\?"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_a_user_gets_wrong_is_named(what, tmp_path):
    change, message = WRONG[what]
    settings = smoke()
    with settings.unlocked():
        change(settings)
    with pytest.raises(UserError, match=message) as caught:
        train(settings, tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("kind", ["truncated", "empty"])
def test_a_bad_example_is_logged_and_too_many_stop_the_run(kind, tmp_path, caplog):
    one, many = tmp_path / "one", tmp_path / "many"
    for folder, bad in ((one, {3}), (many, set(range(0, 64, 4)))):
        folder.mkdir()
        write_pictures(folder, 64, **{kind: bad})
    results = train(on_pictures(one), tmp_path / "run")
    assert results["step"] == 12 and results["data/bad_examples"] == 3  # once in each of three epochs
    reason = {"truncated": r"data.jsonl:4: image cannot be decoded", "empty": r"data.jsonl:4: caption `text` is empty"}[
        kind
    ]
    assert [r for r in caplog.messages if re.search(reason, r)]
    with pytest.raises(UserError, match=r"more than max_bad_fraction=0.001; the last is"):
        train(on_pictures(many), tmp_path / "stopped")


def test_a_mixture_trains(tmp_path):
    tables = {}
    for name, count in (("few", 20), ("many", 60)):
        (tmp_path / name).mkdir()
        write_pictures(tmp_path / name, count)
        tables[name] = on_pictures(tmp_path / name)["data"] | {"weight": count}
    settings = on_pictures(tmp_path) | dict(data=dict(sources=tables), duration="1 epoch", checkpoint={})
    assert train(settings, tmp_path / "run")["step"] == 5  # 80 examples in batches of 16
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["sources"]["few"]["weight"] == 20


def test_a_run_that_diverges_stops_and_saves_nothing_broken(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_pictures(folder, 64)
    settings = on_pictures(folder)
    settings["optimizer"] = dict(name="sgd", lr=1e30, schedule=dict(name="constant"))
    with pytest.raises(UserError, match=r"^step \d+: loss is .*largest by group: .*config.optimizer.lr"):
        train(settings, tmp_path / "run")
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert saved == ["1"]  # of before the step that broke
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(load_params(tmp_path / "run")))


@pytest.mark.subprocess
def test_on_the_command_line_it_is_one_line(tmp_path):
    for override in ("--config.optimizer.lrr=1", "--config.objective.penalty=hinge"):
        code, errors = finish(start(tmp_path, override))
        assert code == 2 and "Traceback" not in errors
        assert len([line for line in errors.splitlines() if line.startswith("error: ")]) == 1
        assert override.split(".")[-1].split("=")[0] in errors


def test_a_finished_run_answers_at_once_and_a_run_has_its_folder_alone(tmp_path, monkeypatch, capsys):
    workdir, results = tmp_path / "run", {"step": 2, "loss/top1": 0.5}
    (workdir / "checkpoints" / "2").mkdir(parents=True)
    write_json(workdir / "config.json", plain(smoke()))
    write_json(workdir / "results.json", results)
    monkeypatch.setattr("vlm_jax.train._train", None)
    assert train(smoke(), workdir) == results and (workdir / "report" / "index.html").exists()
    assert "holds the results of this config; to train again" in capsys.readouterr().out
    with pytest.raises(TypeError):  # another config trains, or says why not
        train(smoke().copy_and_resolve_references() | {"seed": 1}, workdir)
    (workdir / "results.json").write_text('{"step": 2, "lo')
    with pytest.raises(TypeError):  # evaluates again
        train(smoke(), workdir)
    with locked(workdir), pytest.raises(UserError, match=r"run is in use by process \d+"):
        train(smoke(), workdir)


def test_token_ids_beyond_the_vocabulary_are_refused(tmp_path, monkeypatch):
    """A look-up beyond the table gives NaN."""
    write_pictures(tmp_path, 20)
    settings = on_pictures(tmp_path)
    settings["model"]["text"]["vocab_size"] = 100
    monkeypatch.setattr(Program, "compile_step", lambda _: None)
    with pytest.raises(UserError, match=r"config.data: `token_ids` has the id \d{3,}, the model's vocabulary 100 ids"):
        train(settings, tmp_path / "run")


def test_another_config_does_not_touch_a_run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"batch_size": 3}))
    with pytest.raises(UserError, match=r"holds a run with config\."):
        train(smoke(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {"batch_size": 3}
