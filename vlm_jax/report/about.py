"""Facts about a run, kept beside its results and shown on top of its page."""

import pathlib
import platform
import time
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

from vlm_jax import __version__, command
from vlm_jax.data.files import write_json

NAME = "run.json"


def save_about(workdir: str | pathlib.Path, what: str, model: Any, data: str, params: Any, mesh: Any = None) -> None:
    """Writes `workdir/run.json`: heading -> text.

    Args:
      workdir: the run's folder.
      what: what ran: "training", "evaluation: zeroshot".
      model: the model, or its name.
      data: name of the data set, with its split.
      params: the model's parameters.
      mesh: of the devices; None: all of this process.
    """
    devices = jax.devices() if mesh is None else list(mesh.devices.flat)
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
    name = model if isinstance(model, str) else type(model).__name__
    facts = {
        "what": what,
        "finished": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "model": f"{name}: {count:,} parameters",
        "data": data,
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "version": f"vlm_jax {__version__}, jax {version('jax')}, Python {platform.python_version()}",
    }
    if command.line is not None:
        facts["command"] = command.line
    write_json(pathlib.Path(workdir) / NAME, facts)
