"""Runs of the trainer: a config small enough for a test, a process of its own, what it writes."""

import json
import os
import subprocess
import sys

from configs import clip
from tests.support.paths import ROOT


def on_pictures(folder, batch_size=16):
    """configs/clip.py:smoke for 12 steps on what `write_pictures` wrote into the folder."""
    settings = clip.get_config("smoke").to_dict()
    ops = "decode | resize(32) | normalize | caption('text') | tokenize(8) | keep('image', 'token_ids')"
    return settings | dict(
        data=dict(uri=f"jsonl:{folder}/data.jsonl", ops=ops),
        objective=dict(name="contrastive"),
        optimizer=dict(name="adamw", lr=1e-3),
        batch_size=batch_size,
        duration="12 steps",
        evals=None,
        checkpoint=dict(every="1 steps"),
        log=dict(tensorboard=False),
    )


def start(workdir, *overrides, config="configs/clip.py:smoke", **env):
    """A process of `python -m vlm_jax.train`."""
    command = [sys.executable, "-m", "vlm_jax.train", f"--config={config}", f"--workdir={workdir}", *overrides]
    always = {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # the same run comes again
    env = os.environ | always | env
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def lines(workdir):
    """The records of metrics.jsonl, as far as it is written."""
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
