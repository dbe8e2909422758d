"""The evaluation command: the same numbers for any batch size, mesh and host count, and after any kill."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from PIL import Image

import vlm_jax
from configs import clip
from tests.support.models import untrained
from vlm_jax import config, report
from vlm_jax import evaluate as command
from vlm_jax.command import commands
from vlm_jax.data import loader
from vlm_jax.errors import UserError
from vlm_jax.evaluate import evaluate
from vlm_jax.evaluators import classes, progress
from vlm_jax.params import sharding
from vlm_jax.pretrained import class_embeddings
from vlm_jax.run import checkpoint
from vlm_jax.run.program import TrainState

ROOT = Path(__file__).parents[1]
WORDS = ["cat", "dog", "sun", "moon", "tree", "house", "car", "boat", "apple", "star", "hat", "key"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A workdir with the parameters of an untrained model."""
    folder = tmp_path_factory.mktemp("run")
    settings = config.plain(clip.get_config("smoke"))
    params = untrained(settings).params
    saver = checkpoint.Checkpointer(folder)
    saver.save(1, TrainState(step=jnp.int32(1), params=params, opt_state=(), ema=None), {})
    saver.close()
    checkpoint.write_json(folder / "config.json", settings)
    return folder


@pytest.fixture(scope="module")
def pretrained(workdir):
    return vlm_jax.load(workdir)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """45 pictures of noise with a label among twelve words (two have another), no to three captions; one is broken."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(45):
        pixels = rng.integers(0, 256, (6, 6, 3), np.uint8)
        Image.fromarray(pixels).resize((40, 32), Image.Resampling.NEAREST).save(folder / f"{i}.png")
        label = i % 12 if i not in (4, 30) else 99
        captions = [f"a {WORDS[i % 12]}", f"the {WORDS[(i * 5) % 12]} {i}", "thing"][: i % 4]
        rows.append(json.dumps({"image": f"{i}.png", "label": label, "captions": captions}))
    (folder / "17.png").write_bytes((folder / "17.png").read_bytes()[:50])
    (folder / "pictures.jsonl").write_text("\n".join(rows))
    return f"jsonl:{folder}/pictures.jsonl"


def arguments(task, pictures):
    own = dict(classes=WORDS, templates="imagenet7") if task == "zeroshot" else dict(captions="captions")
    return dict(uri=pictures, gallery=0, **own)


@pytest.fixture(scope="module")
def expected(pretrained, pictures):
    """The numbers of each task, made plainly: everything in memory, one device, argsort."""
    found = {}
    batches = loader.eval_batches(
        uri=pictures, ops=f"{pretrained.preprocess} | keep('image', 'label', 'captions')", batch_size=45
    )
    batch = next(iter(batches))
    rows = np.flatnonzero(batch["mask"] & (batch["label"] < 12))
    text = class_embeddings(pretrained.embed_texts, WORDS, classes.read_templates("imagenet7"))
    image = pretrained.embed_image_batch(batch["image"])
    order = np.argsort(-(image[rows] @ text.T), axis=1)
    truth = batch["label"][rows][:, None]
    right = order[:, 0] == truth[:, 0]
    found["zeroshot"] = {
        "top1": right.mean(),
        "top5": (order[:, :5] == truth).any(1).mean(),
        "mean_per_class": np.mean([right[truth[:, 0] == c].mean() for c in range(12)]),
        "examples": 42,
        "left_out": 2,
        "bad_examples": 1,
        "ties": 0,
    }
    rows = [i for i in range(45) if batch["mask"][i] and batch["captions"][i]]
    owner = np.array([n for n, i in enumerate(rows) for _ in batch["captions"][i]])
    texts = pretrained.embed_texts([text for i in rows for text in batch["captions"][i]])
    similarity = (image[rows].astype(np.float64) @ texts.astype(np.float64).T).astype(np.float32)
    of_texts = [text for i in rows for text in batch["captions"][i]]
    right = np.array([[text in batch["captions"][i] for text in of_texts] for i in rows])  # "thing" is of many
    shared = int((right.sum(0) > 1).sum())
    assert shared > 3
    found["retrieval"] = {"images": len(rows), "texts": len(owner), "left_out": 44 - len(rows)}
    found["retrieval"] |= {"identical_texts": shared, "ties": 0, "bad_examples": 1}
    for k in (1, 5, 10):
        near = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
        found["retrieval"][f"image_to_text/recall@{k}"] = np.mean([right[i, n].any() for i, n in enumerate(near)])
        near = np.argsort(-similarity.T, axis=1, kind="stable")[:, :k]
        found["retrieval"][f"text_to_image/recall@{k}"] = np.mean([right[n, t].any() for t, n in enumerate(near)])
    return found


def numbers(results, task):
    """The metrics by name, each of whose shares lies in its interval."""
    found = {name.removeprefix(f"{task}/"): value for name, value in results.items() if "/" in name}
    intervals = {name: found.pop(name) for name in list(found) if name.endswith("/interval")}
    assert len(intervals) == (3 if task == "zeroshot" else 6)
    assert all(low <= found[name.removesuffix("/interval")] <= high for name, (low, high) in intervals.items())
    found.pop("notes", None)
    return found


@pytest.mark.parametrize("task", ["zeroshot", "retrieval"])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batch_size_changes_nothing(task, batch_size, pretrained, pictures, expected):
    results = evaluate(pretrained, task, batch_size=batch_size, **arguments(task, pictures))
    assert numbers(results, task) == pytest.approx(expected[task], abs=1e-12)


@pytest.mark.parametrize("task", ["zeroshot", "retrieval"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1), (4, 2, 1), (2, 2, 2)], ids=str)
def test_mesh_changes_nothing(task, shape, workdir, pictures, expected):
    spread = vlm_jax.load(workdir, mesh=sharding.make_mesh(*shape, devices=jax.devices()[: np.prod(shape)]))
    results = evaluate(spread, task, batch_size=7, **arguments(task, pictures))
    assert numbers(results, task) == pytest.approx(expected[task], abs=1e-12)


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def test_two_processes_give_the_same(workdir, pictures, expected, tmp_path):
    program = f"""
import sys, jax
import json
import numpy as np
import vlm_jax
from vlm_jax.params import sharding
from vlm_jax.run import processes
from vlm_jax.data import confined
from vlm_jax.evaluate import evaluate
jax.config.update("jax_num_cpu_devices", 2)
processes.start("localhost:{free_port()},2," + sys.argv[1])
read, opened = [], confined.read
confined.read = lambda root, name, *options: read.append(name) or opened(root, name, *options)
for name, sizes, order in (("apart", (4, 1, 1), (0, 2, 1, 3)), ("tensor", (1, 2, 2), (0, 1, 2, 3))):
    devices = [jax.devices()[i] for i in order]  # "apart": a process's rows are no neighbours, as on a pod
    mesh = sharding.make_mesh(*sizes, devices)
    rows = sharding.rows_of_process(mesh, 8)
    assert name == "tensor" or rows.tolist() in ([0, 1, 4, 5], [2, 3, 6, 7]), rows
    batch = sharding.to_global({{"row": np.arange(8)[rows]}}, mesh, 8)
    assert processes.whole(batch["row"]).tolist() == list(range(8))
    pretrained = vlm_jax.load({str(workdir)!r}, mesh=mesh)
    for task, section in { ({task: arguments(task, pictures) for task in expected})!r}.items():
        out = None if name == "tensor" else {str(tmp_path)!r} + "/" + task
        results = evaluate(pretrained, task, out, batch_size=7, **section)
        print("RESULT", json.dumps([name, task, results]), flush=True)
    print("READ", json.dumps([name, len(read)]), flush=True)
"""
    start = lambda i: subprocess.Popen(
        [sys.executable, "-c", program, str(i)], cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    processes = [start(i) for i in range(2)]
    finished = [process.communicate(timeout=120) for process in processes]
    for process, (output, errors) in zip(processes, finished, strict=True):
        assert process.returncode == 0, errors[-3000:]
        found = [json.loads(line[7:]) for line in output.splitlines() if line.startswith("RESULT ")]
        assert [name for name, *_ in found] == ["apart", "apart", "tensor", "tensor"]
        for _, task, results in found:
            assert numbers(results, task) == pytest.approx(expected[task], abs=1e-12)
    half = [json.loads(output.split("READ ")[1].splitlines()[0])[1] for output, _ in finished]
    assert max(half) < 0.7 * sum(half), f"each reads its share of the pictures, not all: {half}"
    for task in expected:
        written = json.loads((tmp_path / task / "results.json").read_text())
        assert numbers(written, task) == pytest.approx(expected[task], abs=1e-12)
        assert sorted(path.name for path in (tmp_path / task).iterdir())[0] == "artifacts"


PROGRAM = """
import time
from vlm_jax import command, evaluate, pretrained
from vlm_jax.evaluators import progress
from vlm_jax.evaluators.tasks import zeroshot
progress.SAVE_SECONDS, zeroshot.PROMPTS, embed = 0, 4, pretrained.Pretrained.embed_image_batch
pretrained.Pretrained.embed_image_batch = lambda self, images: time.sleep({pause}) or embed(self, images)
command.run("evaluate", evaluate.main)
"""


def start(task, workdir, pictures, out, pause=0.0):
    """The command, saving after every batch, and with a pause before each."""
    own = [f"--classes={WORDS}", "--label=label"] if task == "zeroshot" else ["--captions=captions", "--ks=1,3"]
    argv = [f"--model={workdir}", f"--task={task}", f"--data={pictures}", f"--out={out}", "--batch_size=3"]
    argv += [*own, "--gallery=2"]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(pause=pause), *argv],
        cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("task", ["zeroshot", "retrieval"])
def test_killed_and_continued_gives_the_same_bytes(task, workdir, pictures, tmp_path, monkeypatch):
    killed = start(task, workdir, pictures, tmp_path / "killed", pause=0.3)
    record = tmp_path / "killed" / "progress" / "progress.json"
    done = lambda: json.loads(record.read_text())["counts"].get("batches", 0) if record.exists() else 0
    while killed.poll() is None and done() < 4:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    before = done()
    assert 4 <= before < 15 and not (tmp_path / "killed" / "results.json").exists()
    continued = start(task, workdir, pictures, tmp_path / "killed")
    one = sharding.make_mesh(devices=jax.devices()[:1])
    section = dict(classes=WORDS, label="label") if task == "zeroshot" else dict(captions=["captions"], ks=[1, 3])
    model = vlm_jax.load(workdir, mesh=one)
    monkeypatch.setattr(report, "write", lambda _: None)  # drawing takes longer than all else
    evaluate(model, task, tmp_path / "whole", model=str(workdir), uri=pictures, batch_size=3, gallery=2, **section)
    output, errors = continued.communicate(timeout=120)
    assert continued.returncode == 0, errors[-2000:]
    assert f"continuing after {before} of 15 batches" in output
    assert f"report: {tmp_path / 'killed' / 'report' / 'index.html'}" in output
    same_files(tmp_path / "killed", tmp_path / "whole", task)
    assert not record.parent.exists()


def same_files(one, other, task):
    for name in ("results.json", f"artifacts/{task}.json", f"artifacts/{task}.npz"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("task", ["zeroshot", "retrieval"])
def test_interrupted_anywhere_and_continued(task, pretrained, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "SAVE_SECONDS", 0)
    monkeypatch.setattr(report, "write", lambda _: None)
    section = {**arguments(task, pictures), "batch_size": 7, "gallery": 3}
    whole = evaluate(pretrained, task, tmp_path / "whole", **section)
    calls, save = [0], progress.Progress.save

    def save_or_stop(self, **counts):
        calls[0] += 1
        if calls[0] % 3 == 0:  # rows are appended, but not saved
            raise KeyboardInterrupt
        save(self, **counts)

    monkeypatch.setattr(progress.Progress, "save", save_or_stop)
    stops, results = 0, None
    while results is None:
        try:
            results = evaluate(pretrained, task, tmp_path / "killed", **section)
        except KeyboardInterrupt:
            stops += 1
            assert stops < 20 and not (tmp_path / "killed" / "results.json").exists()
    assert stops >= 3 and results == whole
    same_files(tmp_path / "killed", tmp_path / "whole", task)


def test_a_failed_evaluation_does_not_block_its_folder(pretrained, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "write", lambda _: None)
    section = {**arguments("retrieval", pictures), "batch_size": 7}
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(type(pretrained), "embed_image_batch", None)
        evaluate(pretrained, "retrieval", tmp_path, **section | {"batch_size": 8})
    assert evaluate(pretrained, "retrieval", tmp_path, **section)["retrieval/images"] == 32
    (tmp_path / "results.json").write_text('{"retrieval/images": 3')
    assert evaluate(pretrained, "retrieval", tmp_path, **section)["retrieval/images"] == 32


def test_a_folder_keeps_one_evaluation(pretrained, pictures, tmp_path, monkeypatch):
    section = {**arguments("retrieval", pictures), "batch_size": 7}
    results = evaluate(pretrained, "retrieval", tmp_path / "out", model="tiny", **section)
    assert (tmp_path / "out" / "report" / "index.html").read_text().count("recall@1") == 4  # @1 and @10, both ways
    again = dataclasses.replace(pretrained, params=jax.tree.map(lambda x: x + 0, pretrained.params))
    monkeypatch.setattr(type(pretrained), "embed_image_batch", None)  # nothing is embedded again
    assert evaluate(again, "retrieval", tmp_path / "out", model="tiny", **section) == results
    with pytest.raises(UserError, match=r"holds an evaluation with evaluator.batch_size = 7, not 8; choose another"):
        evaluate(pretrained, "retrieval", tmp_path / "out", model="tiny", **section | {"batch_size": 8})
    other = dataclasses.replace(pretrained, params=jax.tree.map(lambda x: x + 1, pretrained.params))
    with pytest.raises(UserError, match=r"with params_sha256 = \w+, not \w+; choose another --out or delete it"):
        evaluate(other, "retrieval", tmp_path / "out", model="tiny", **section)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"something else than an evaluation .a training run\?.; choose another --out$"):
        evaluate(pretrained, "retrieval", tmp_path, **section)
    (tmp_path / "config.json").rename(tmp_path / "results.json")
    with pytest.raises(UserError, match="results of something else"):
        evaluate(pretrained, "retrieval", tmp_path, **section)


def test_embeddings_beyond_the_memory_share_change_nothing(pretrained, pictures, expected):
    tables, table = [], progress.Progress.table

    def remember(self, name, limit):
        tables.append(table(self, name, limit))
        return tables[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress.Progress, "table", remember)
        section = arguments("retrieval", pictures)
        results = evaluate(pretrained, "retrieval", memory_share=1e-9, **section)
    assert numbers(results, "retrieval") == pytest.approx(expected["retrieval"], abs=1e-12)
    assert len(tables) == 2 and not any(table.in_memory for table in tables)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--task=zero", "the task is `zero` (did you mean `zeroshot`?)"),
        ("--task=retrieval --label=label", "evaluator `retrieval` has no key `label`; known keys: uri, split,"),
        ("--task=zeroshot", "no names for its `label`; give --classes: a .txt or .json file, `emoji:seen`, or one of"),
        ("--task=zeroshot --classes=['a'", "--classes=['a' cannot be read; expected a name, a file, a list"),
        ("--task=zeroshot --templates=imagenet_80 --classes=cifar10", "did you mean `imagenet80`?"),
        ("--task=zeroshot --classes=cifar10 --label=labels", "has no field `labels`"),
        ("--task=zeroshot --classes=cifar10 --where=style", "--where=style cannot be read; expected field=value,value"),
        ("--task=zeroshot --classes=cifar10 --mesh=dat=1", "--mesh has no key `dat`; did you mean `data`?"),
        ("--task=zeroshot --classes=cifar10 --mesh=8", "--mesh=8 cannot be read; expected data=8"),
        ("--task=zeroshot --classes=cifar10 --mesh=data=3", "does not fit 8 devices"),
        (
            "--task=zeroshot --classes=cifar10 --memory_share=25",
            "memory_share is 25.0; expected a share",
        ),
        ("--task=zeroshot --classes=cifar10 --model=/nowhere", "/nowhere"),
        ("--task=probe --label=label --option=shots=0", "shots is 0; expected a number of training pictures"),
        ("--task=probe --label=label --option=shots", "--option=shots cannot be read; expected name=value"),
        ("--task=foils --option=kinds=['orders']", "the kind of foils is `orders`; expected one of: object, attribute"),
    ],
)
def test_mistakes_are_named(argv, message, workdir, pictures, tmp_path):
    values = flags.FlagValues()
    commands.define("evaluate", values)
    values(["evaluate", f"--model={workdir}", f"--data={pictures}", f"--out={tmp_path}", *argv.split()])
    with pytest.raises(UserError) as error:
        command.main([], values)
    assert message in str(error.value)
