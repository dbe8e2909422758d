"""Several processes of one run: the same as one, also when one is killed or told to stop, or others go on."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from tests.support.paths import ROOT
from tests.support.pictures import write_pictures
from tests.support.runs import lines
from tests.support.runs import start as start_one
from vlm_jax.errors import UserError
from vlm_jax.run import processes

STEPS = 12
CONFIG = """
from ml_collections import ConfigDict
from configs import clip

def get_config():
    config = clip.get_config("smoke").to_dict()
    ops = "decode | resize(32) | normalize | caption('text') | tokenize(8) | keep('image', 'token_ids')"
    uri = "jsonl:{folder}/data.jsonl"
    return ConfigDict(config | dict(
        data=dict(uri=uri, ops=ops), objective=dict(name="contrastive"), optimizer=dict(name="adamw", lr=1e-3),
        batch_size=16, duration="{steps} steps", ema=0.9, checkpoint=dict(every="4 steps"),
        evals=dict(retrieval=dict(type="retrieval", uri=uri, captions="text", gallery=0)),
        log=dict(every="1 steps", tensorboard=False),
    ))
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A file with the config of a small run on 64 pictures, one of which is broken."""
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder, 64, truncated={3})
    (folder / "config.py").write_text(CONFIG.format(folder=folder, steps=STEPS))
    return folder / "config.py"


def start(config, workdir, count, devices, *overrides):
    """All processes of a run, each with so many devices."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    join = [[f"--distributed=localhost:{port},{count},{i}"] if count > 1 else [] for i in range(count)]
    devices = {"JAX_NUM_CPU_DEVICES": str(devices)}
    return [start_one(workdir, *overrides, *own, config=config, **devices) for own in join]


def finish(run, timeout=300):
    """(exit status, stdout, stderr) of each process."""
    deadline = time.monotonic() + timeout
    try:
        texts = [process.communicate(timeout=max(deadline - time.monotonic(), 0.1)) for process in run]
    finally:
        for process in run:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(run, texts, strict=True)]


def losses(workdir):
    return {line["step"]: line["loss"] for line in lines(workdir) if "loss" in line}


def results(workdir):
    numbers = json.loads((workdir / "results.json").read_text())
    return {name: value for name, value in numbers.items() if not name.startswith("train/")}


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The run in one process with two devices."""
    workdir = tmp_path_factory.mktemp("one")
    ((code, _, errors),) = finish(start(config, workdir, 1, 2))
    assert code == 0, errors
    assert len(losses(workdir)) == STEPS and results(workdir)["data/bad_examples"] == STEPS // 4
    return workdir


@pytest.mark.subprocess
def test_two_processes_are_one_bit_for_bit(config, whole, tmp_path):
    first, second = finish(start(config, tmp_path, 2, 1, "--config.evals.retrieval.gallery=24"))
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert results(tmp_path) == results(whole)
    assert losses(tmp_path) == losses(whole)
    assert "report: " in first[1] and "report: " not in second[1]  # one speaks and writes


SCENES = """
from configs import {recipe}
TASKS = {tasks}

def get_config():
    config = {recipe}.get_config("smoke")
    scenes = dict(uri="scenes:?examples=12&size=32", split="train", batch_size=8, ops="decode | normalize")
    config.evals = {{name: dict(type=name, **scenes, **more) for name, more in TASKS.items()}}
    config.update(dict(duration="1 steps", batch_size=8))
    return config
"""
TASKS = {
    "clip": {
        "foils": dict(caption="caption", foils="foils"),
        "image_retrieval": dict(label="style", gallery_split="train"),
        "retrieval": dict(captions="long_caption"),
        **{name: {} for name in ("composed_retrieval", "counting", "minimal_pairs", "questions", "regions")},
    },
    "cappa": {"answers": {}, "grounding": {}, "captions": dict(captions="caption", objects="names/en")},
}


@pytest.mark.subprocess
@pytest.mark.parametrize("recipe", TASKS)
def test_tasks_on_scenes_are_the_same_on_two_processes(recipe, tmp_path):
    (tmp_path / "config.py").write_text(SCENES.format(recipe=recipe, tasks=TASKS[recipe]))
    runs = {count: start(tmp_path / "config.py", tmp_path / str(count), count, 2 // count) for count in (1, 2)}
    for run in runs.values():
        for code, _, errors in finish(run):
            assert code == 0, errors
    one, two = (results(tmp_path / str(count)) for count in runs)
    assert one == two and all(any(key.startswith(task) for key in one) for task in TASKS[recipe])


def wait_for(run, condition):
    while not condition():
        ended = [process.poll() for process in run]
        assert ended == [None] * len(run), [process.communicate()[1][-2000:] for process in run if process.poll()]
        time.sleep(0.01)


@pytest.mark.subprocess
@pytest.mark.parametrize(
    ("count", "victim", "then"),
    [
        (4, 2, (2, 1, "--config.mesh.data=1", "--config.mesh.fsdp=2")),
        (2, 0, (1, 4)),
    ],
    ids=["one of four", "the first of two"],
)
def test_one_killed_stops_all_and_others_go_on(count, victim, then, config, whole, tmp_path):
    run = start(config, tmp_path, count, 1, "--config.mesh.fsdp=2", f"--config.mesh.tensor={count // 2}")
    saved = tmp_path / "checkpoints" / "4"
    wait_for(run, saved.exists)
    run[victim].send_signal(signal.SIGKILL)
    ended = finish(run, timeout=60)  # within a minute
    for index, (code, _, errors) in enumerate(ended):
        assert code != 0
        if index != victim:
            lost = rf"error: process {index} of {count}: a process of the run is lost .* they go on from"
            assert re.search(lost, errors) or "another task died" in errors, errors[-2000:]
    before = max(losses(tmp_path))
    assert before < STEPS
    for code, _, errors in finish(start(config, tmp_path, *then)):
        assert code == 0, errors
    # the batches, too, are those of the uninterrupted run, on any mesh
    assert losses(tmp_path).keys() == losses(whole).keys()
    np.testing.assert_allclose(list(losses(tmp_path).values()), list(losses(whole).values()), rtol=2e-4)
    assert results(tmp_path)["data/bad_examples"] == results(whole)["data/bad_examples"]


@pytest.mark.subprocess
def test_a_preempted_process_makes_all_save_one_step(config, whole, tmp_path):
    run = start(config, tmp_path, 2, 1)
    wait_for(run, (tmp_path / "config.json").exists)  # they have met; the first step is to come
    run[1].terminate()
    ended = finish(run)
    (step,) = {int(re.search(r"SIGTERM: saved step (\d+) of", errors)[1]) for _, _, errors in ended}
    assert {code for code, *_ in ended} == {1}
    assert (tmp_path / "checkpoints" / str(step)).is_dir() and step < STEPS
    ((code, output, errors),) = finish(start(config, tmp_path, 1, 2))
    assert code == 0, errors
    assert f"continuing from step {step} of {STEPS}" in output
    assert results(tmp_path) == results(whole) and losses(tmp_path) == losses(whole)


def test_processes_with_other_data_are_refused(monkeypatch):
    processes.check_equal({"jsonl:a": "1"}, "data")
    seen = [{"jsonl:a": "1", "b": "2"}, {"jsonl:a": "1", "b": "2"}, {"jsonl:a": "1", "b": "3"}]
    monkeypatch.setattr(processes, "exchange", lambda value: seen)
    with pytest.raises(UserError, match="process 2 of 3 has other data than the first process: `b`; give all"):
        processes.check_equal(seen[0], "data")


HOW = "--distributed={} is not `address:port,processes,index`, or `auto` on a TPU"


@pytest.mark.parametrize(
    "how", ["localhost", "localhost:1234,two,0", "localhost,2,0", "localhost:99999,2,0", "localhost:1,2,2", ":1,2,0"]
)
def test_how_processes_meet_is_checked(how):
    with pytest.raises(UserError, match=HOW.format(how)):
        processes.start(how)


def test_where_processes_meet_is_checked_in_seconds(monkeypatch):
    """JAX itself waits for five minutes at an address without a first process, and crashes at a port in use."""
    monkeypatch.setattr(processes, "JOIN_SECONDS", 0.4)
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen at port {port} .Address already in use.; end what uses it"):
            processes.start(f"localhost:{port},2,0")
        processes.reach(f"localhost:{port}", first=False)
    for address in (f"localhost:{port}", f"host.invalid:{port}"):
        with pytest.raises(UserError, match=f"{address} has no first process .*; check address and port"):
            processes.start(f"{address},2,1")
    with pytest.raises(UserError, match=r"host.invalid:.* does not lead to this machine, the first process's"):
        processes.start(f"host.invalid:{port},2,0")
    processes.reach(f"localhost:{port}", first=True)


def test_a_port_in_use_is_named_where_slurm_gives_it(monkeypatch):
    job = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda **_: None)
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        for setting, value in (("PORT", str(port)), ("ADDRESS", f"localhost:{port}")):
            monkeypatch.setenv(f"JAX_COORDINATOR_{setting}", value)
            monkeypatch.setenv("SLURM_PROCID", "0")
            with pytest.raises(UserError, match=f"listen at port {port} .* or set JAX_COORDINATOR_PORT for all"):
                processes.start("auto")
            monkeypatch.setenv("SLURM_PROCID", "1")
            processes.start("auto")
    monkeypatch.setenv("SLURM_PROCID", "0")
    processes.start("auto")


@pytest.mark.subprocess
def test_nothing_says_which_processes_there_are():
    program = "from vlm_jax.run import processes; processes.start('auto')"
    nowhere = {"PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu"}  # no job of Slurm or another
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=nowhere, capture_output=True, text=True)
    assert f"UserError: {HOW.format('auto')}" in done.stderr


@pytest.mark.subprocess
def test_slurm_says_who_is_there(tmp_path):
    program = """
import jax
from vlm_jax.run import processes
from vlm_jax.run.checkpoint import Checkpointer
processes.start("auto")
print("FOUND", processes.exchange([jax.process_index(), jax.process_count()]))
with processes.joined(None):
    Checkpointer({folder!r} + str(jax.process_index()))
"""
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    job |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    run = [
        subprocess.Popen(
            [sys.executable, "-c", program.format(folder=str(tmp_path / "host"))], cwd=ROOT, text=True,
            env={**os.environ, **job, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]  # fmt: skip
    for index, (code, output, errors) in enumerate(finish(run)):
        assert "FOUND [[0, 2], [1, 2]]" in output, errors
        # each host has a folder of its own
        assert code == 2 and f"error: process {index} of 2: the processes see different checkpoints in" in errors


@pytest.fixture
def scripts(tmp_path):
    """The scripts of docs/pods.md, with a PATH whose commands only say what they are given; srun ends as $SRUN says."""
    page = (ROOT / "docs" / "pods.md").read_text()
    say = '#!/bin/bash\nprintf "%s " "$(basename "$0")" "$@"; echo\n'
    for name in ("bin/gcloud", "bin/git", "bin/scontrol", "bin/python3", ".venv/bin/python", ".venv/bin/pip"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(say)
    (tmp_path / "bin" / "srun").write_text(say + "eval $SRUN\n")
    for path in tmp_path.glob("**/bin/*"):
        path.chmod(0o755)
    env = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SHARED": "/shared", "SRUN": "true"}
    env |= {"SLURM_JOB_NAME": "siglip", "SLURM_JOB_ID": "17"}

    def run(script, **changes):
        given = ["bash", "-c", script, "script", "configs/clip.py:smoke", "--config.mesh.fsdp=2"]
        return subprocess.run(given, cwd=tmp_path, env=env | changes, capture_output=True, text=True)

    return re.findall(r"```bash\n(#!.*?)```", page, re.DOTALL), run


@pytest.mark.subprocess
def test_launch_scripts_give_flags_that_train_has(scripts, monkeypatch):
    texts, run = scripts
    for text, several in zip(texts, (True, True, False), strict=True):
        done = run(text)
        assert done.returncode == 0, done.stderr
        (given,) = re.findall(r"vlm_jax\.train (.*)", done.stdout)
        assert ("--distributed=auto" in given) == several
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=values)
        for name in ("workdir", "distributed"):
            flags.DEFINE_string(name, None, "", flag_values=values)
        monkeypatch.setattr(sys, "argv", ["train", *given.split()])  # where config_flags look for overrides
        values(sys.argv)
        assert values.config.mesh.fsdp == 2 and values.workdir


@pytest.mark.subprocess
@pytest.mark.parametrize(
    ("ends", "status", "again"),
    [("true", 0, False), ("exit 2", 2, False), ("mkdir -p runs/siglip/checkpoints/8; exit 134", 134, True)],
)
def test_the_slurm_job_comes_again_as_long_as_it_gets_on(ends, status, again, scripts):
    (_, script, _), run = scripts
    done = run(script, SRUN=ends)
    assert done.returncode == status
    assert ("scontrol requeue 17" in done.stdout) == again


@pytest.mark.subprocess
def test_a_disk_that_is_full_on_one_host_is_named(tmp_path):
    program = """
import sys, resource
import jax, jax.numpy as jnp
from vlm_jax.params import sharding
from vlm_jax.run import checkpoint, processes
checkpoint.WRITE_SECONDS = 5
with processes.joined(sys.argv[1]):
    place = sharding.batch_sharding(sharding.make_mesh())
    state = {"a": jax.jit(lambda: jax.random.normal(jax.random.key(0), (64, 4096)), out_shardings=place)()}
    saver = checkpoint.Checkpointer(sys.argv[2])
    saver.save(1, state, {})
    saver.wait()
    if jax.process_index():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**20))
    saver.save(2, state, {})
    saver.wait()
"""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    run = [
        subprocess.Popen(
            [sys.executable, "-c", program, f"localhost:{port},2,{i}", str(tmp_path)], cwd=ROOT, text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]  # fmt: skip
    first, second = finish(run, timeout=90)
    assert first[0] != 0 and second[0] == 2, first[2] + second[2]
    assert "error: process 1 of 2: no checkpoint can be written" in second[2]
    assert "(File too large); that of step 1 is whole" in second[2]
