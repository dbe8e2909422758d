"""Checkpoints of a run: asynchronous, atomic, complete.

A checkpoint holds the train state (parameters, optimizer, EMA, objective state, step), the data position and the
run's counters. A run that is killed at any point and started again continues from the newest one.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from vlm_jax.config import flatten
from vlm_jax.errors import UserError
from vlm_jax.parameter_table import named_leaves


class Checkpointer:
    """Saves and restores `(state, progress)` in `workdir/checkpoints/<step>/`.

    Args:
      workdir: the run's folder.
      keep: how many checkpoints stay.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int = 2):
        self._manager = ocp.CheckpointManager(
            Path(workdir).absolute() / "checkpoints",
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True),
        )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: Any, progress: Mapping[str, Any]) -> None:
        """Copies the state off the devices and returns; writing goes on in the background."""
        if step == self.latest_step():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(dict(progress))),
        )

    def restore(self, abstract_state: Any) -> tuple[Any, dict]:
        """Returns the newest checkpoint's state and progress.

        Args:
          abstract_state: tree of ShapeDtypeStructs with shardings: how the state is to be placed.

        Raises:
          UserError: the checkpoint holds another model or optimizer than the config.
        """
        step = self.latest_step()
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract_state), progress=ocp.args.JsonRestore()
                ),
            )
        except (ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"checkpoint {step} does not fit the config's model and optimizer ({reason}); "
                "use the config it was made with, or another --workdir"
            ) from error
        return restored.state, restored.progress

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def load_params(workdir: str | os.PathLike, shardings: Callable[[Any], Any] | None = None) -> Any:
    """Returns the newest checkpoint's parameters (the EMA's where the run kept one).

    Args:
      workdir: the run's folder.
      shardings: tree of shapes -> tree of shardings, where the arrays go; None gives numpy arrays.

    Raises:
      UserError: the folder holds no finished checkpoint.
    """
    folder = Path(workdir).absolute() / "checkpoints"
    steps = ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []
    if not steps:
        raise UserError(f"{workdir} holds no checkpoint; expected a workdir that `vlm_jax.train` wrote")
    with ocp.StandardCheckpointer() as checkpointer:
        path = folder / str(max(steps)) / "state"
        meta = checkpointer.metadata(path).item_metadata
        host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        placed = lambda leaf, place=host: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
        target = jax.tree.map(placed, dict(meta))
        key = "ema" if meta["ema"] else "params"
        if shardings is not None:
            target[key] = jax.tree.map(placed, target[key], shardings(target[key]))
        params = checkpointer.restore(path, target)[key]
    return params if shardings is not None else jax.tree.map(np.asarray, params)


def check_same_config(path: Path, settings: Mapping[str, Any]) -> None:
    """Writes config.json, or raises a UserError if the workdir holds a run of another config."""
    if not path.exists():
        return write_json(path, settings)
    before, now = (flatten(values) for values in (json.loads(path.read_text()), settings))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise UserError(
                f"{path.parent} holds a run with config.{key} = {before.get(key)}, not {now.get(key)}; "
                "give the same config to continue it, or another --workdir"
            )


def params_sha256(params: Any) -> str:
    """Hex digest of every parameter's name, dtype, shape and bytes, in the order of their names."""
    digest = hashlib.sha256()
    for name, leaf in sorted(named_leaves(params).items()):
        array = np.asarray(leaf)
        digest.update(f"{name}:{array.dtype}:{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes JSON so that a reader (or a kill) sees the old file or the new one, never half of it."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)
