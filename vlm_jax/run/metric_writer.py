"""Writes a run's metrics in the background: metrics.jsonl, TensorBoard and, optionally, Weights & Biases."""

import json
import os
import queue
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vlm_jax.data.files import naming, read_jsonl, replacing
from vlm_jax.errors import UserError
from vlm_jax.run import processes


class MetricWriter:
    """Writes `{"step": n, name: number, ...}` lines without blocking the training loop.

    Numbers may be arrays on a device: the writing thread fetches them. Lines after `start_step`, left by a killed run,
    are dropped, so that a resumed run's file equals an uninterrupted run's file. Only the first process writes.

    Args:
      workdir: the run's folder.
      start_step: the run continues after this step.
      tensorboard: also write event files into `workdir/tensorboard`.
      wandb: project name for Weights & Biases (extra `wandb`), or None.
    """

    def __init__(
        self, workdir: str | os.PathLike, start_step: int = 0, tensorboard: bool = True, wandb: str | None = None
    ):
        self._thread = self._error = None
        if not processes.is_first():
            return
        path = Path(workdir) / "metrics.jsonl"
        lines = [line for line in read_jsonl(path) if line["step"] <= start_step]
        with replacing(path) as file:
            file.writelines(json.dumps(line).encode() + b"\n" for line in lines)
        self._file = path.open("ab")
        self._sinks = [self._write_line]
        self._closers = [self._file.close]
        if tensorboard:
            from tensorboardX import SummaryWriter

            board = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=start_step + 1)
            self._sinks.append(lambda step, values: [board.add_scalar(k, v, step) for k, v in values.items()])
            self._closers.append(board.close)
        if wandb:
            self._add_wandb(workdir, wandb)
        self._queue = queue.Queue(maxsize=1000)
        self._thread = threading.Thread(target=self._drain, daemon=True)
        self._thread.start()

    def write(self, step: int, values: Mapping[str, object]) -> None:
        if self._error:
            raise self._error
        if self._thread:
            self._queue.put((step, dict(values)))

    def close(self) -> None:
        """Waits until everything is written."""
        if not self._thread:
            return
        self._queue.put(None)
        self._thread.join()
        for close in self._closers:
            close()
        if self._error:
            raise self._error

    def _drain(self):
        while (item := self._queue.get()) is not None:
            step, values = item
            try:
                numbers = {name: float(np.asarray(value)) for name, value in values.items()}
                numbers = {name: value for name, value in numbers.items() if value == value}  # NaN: an empty mean
                for sink in self._sinks:
                    sink(step, numbers)
            except Exception as error:  # raised in the training thread at its next write
                self._error = error

    def _write_line(self, step, values):
        with naming(self._file.name):
            self._file.write(json.dumps({"step": step, **values}).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def _add_wandb(self, workdir, project):
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                f"config.log.wandb is `{project}` but wandb is not installed; pip install 'vlm_jax[wandb]'"
            ) from error
        run = wandb.init(project=project, dir=str(workdir), id=Path(workdir).absolute().name, resume="allow")
        self._sinks.append(lambda step, values: run.log(values, step=step))
        self._closers.append(run.finish)
