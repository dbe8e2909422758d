import sys

import jax.numpy as jnp
import pytest

from vlm_jax.errors import UserError
from vlm_jax.run.metric_writer import MetricWriter, read_jsonl


def test_lines_are_numbers_and_what_a_killed_run_left_is_dropped(tmp_path):
    writer = MetricWriter(tmp_path, tensorboard=True)
    for step in (1, 2, 3):
        writer.write(step, {"loss": jnp.float32(step / 2)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # cut short by a kill
    assert list((tmp_path / "tensorboard").iterdir())

    writer = MetricWriter(tmp_path, start_step=2, tensorboard=False)
    writer.write(3, {"loss": 9.0})
    writer.close()
    assert read_jsonl(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": 9.0},
    ]


def test_a_write_that_fails_reaches_the_training_thread(tmp_path):
    writer = MetricWriter(tmp_path, tensorboard=False)
    writer.write(1, {"loss": "not a number"})
    with pytest.raises(ValueError, match="not a number"):
        writer.close()


def test_wandb_that_is_not_installed_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it now fails, installed or not
    with pytest.raises(UserError, match=r"pip install 'vlm_jax\[wandb\]'"):
        MetricWriter(tmp_path, tensorboard=False, wandb="project")
