"""Ten lines say what a run is about to do; the table of all parameters is a file."""

from types import SimpleNamespace

import jax
import numpy as np

from vlm_jax.params import sharding
from vlm_jax.run.summary import summary


def test_summary(tmp_path):
    shapes = dict(kernel=np.zeros((300, 40)), bias=np.zeros(40), scale=np.zeros(()))
    groups = dict(kernel="lr x1, wd x1", bias="lr x1, wd x0", scale="frozen")
    program = SimpleNamespace(
        model=SimpleNamespace(), abstract_state=SimpleNamespace(params=shapes), groups=groups, table="the table",
        mesh=sharding.make_mesh(data=-1, devices=jax.devices()[:4]),
    )  # fmt: skip
    batches = SimpleNamespace(num_examples=1000, lengths=(None,), batch_size=64, batches_per_epoch=15)
    about = batches, 125, 8000, {None: 3.2e9}, tmp_path, {"checkpoints": 25}
    lines = summary(program, "tfds:emoji", *about).splitlines()
    assert lines == [
        "devices   4 cpu: data 4 x fsdp 1 x tensor 1",
        "data      tfds:emoji: 1,000 examples, 15 batches of 64 an epoch",
        "model     SimpleNamespace, 12,041 parameters",
        "                 12,000  lr x1, wd x1",
        "                     40  lr x1, wd x0",
        "                      1  frozen",
        "steps     125: 8,000 examples, 8 epochs",
        "FLOPs     3.2 GFLOP a step, 400 GFLOP in all",
        f"writes    {tmp_path}: checkpoints every 25 steps; parameters.txt",
    ]
    assert (tmp_path / "parameters.txt").read_text() == "the table\n"
