"""Checkpoints of a run: asynchronous, atomic, complete. Each process writes and reads its own shards.

A checkpoint holds the train state (parameters, optimizer, EMA, objective state, step), the data position and the
run's counters. A run that is killed at any point and started again continues from the newest undamaged checkpoint, on
any mesh and any number of processes.
"""

import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from vlm_jax.config import flatten
from vlm_jax.data.files import read_kept, write_json
from vlm_jax.errors import UserError
from vlm_jax.objectives import of_model
from vlm_jax.params.table import named_leaves
from vlm_jax.run import processes

# Config keys that may change between restarts: they set where and how fast a run goes, and do not change its result.
FREE = ("mesh", "accumulate", "log", "checkpoint", "profile", "data.workers", "data.threads")
NOT_DAMAGE = (jax.errors.JaxRuntimeError, MemoryError, PermissionError)  # errors that do not mean a damaged file
WRITE_SECONDS = 300  # time that processes wait for the slowest writer
# orbax warns about files that it does not need; a notebook would show nothing but these warnings
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname or record.levelno != logging.WARNING)
# the errors of tasks that write reach `Checkpointer`; asyncio would print their tracebacks, too
logging.getLogger("asyncio").addFilter(lambda record: "never retrieved" not in str(record.msg))


class Checkpointer:
    """Saves and restores `(state, progress)` in `workdir/checkpoints/<step>/`.

    Args:
      workdir: the run's folder, on a file system that all processes share.
      keep: number of checkpoints to keep; with 1 there is no older checkpoint to fall back to.

    Raises:
      UserError: the processes do not see the same folder.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int = 2):
        self._folder = Path(workdir).absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                enable_async_checkpointing=True,
                async_options=ocp.options.AsyncOptions(timeout_secs=WRITE_SECONDS),
                cleanup_tmp_directories=True,
            ),
        )
        # a thread of orbax also asks, about earlier steps, and would disturb `processes.StopSignal`
        self._manager.reached_preemption = lambda step: False
        seen = processes.exchange([self._folder.is_dir(), sorted(self._manager.all_steps())])
        if any(other != seen[0] for other in seen):
            raise UserError(
                f"the processes see different checkpoints in {self._folder}; give a --workdir that all share"
            )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: Any, progress: Mapping[str, Any]) -> None:
        """Copies the state off the devices and returns; a background thread writes the checkpoint.

        Raises:
          UserError: this checkpoint or the previous checkpoint cannot be written.
        """
        if step == self.latest_step():
            return
        progress = {**progress, "checksum": checksum(state)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress))
        with self._writing():
            self._manager.save(step, args=args)

    def restore(self, abstract_state: Callable[[int], Any]) -> tuple[Any, dict]:
        """Returns state and progress of the newest undamaged checkpoint; renames damaged ones.

        Args:
          abstract_state: step -> tree of ShapeDtypeStructs with shardings: the target placement. Every process reads
            only its own shards. Dtypes may differ from the saved dtypes; the checksum is then not checked.

        Raises:
          UserError: the checkpoint does not fit the config's model or optimizer, or all checkpoints are damaged.
        """
        damaged = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            state, progress, damage = self._read(step, abstract_state(step))
            damages = [found for found in processes.exchange(damage) if found]
            saved = progress.pop("checksum", None)
            if not damages and saved is not None and saved != checksum(state):
                damages = ["its checksum is another"]
            if not damages:
                self._set_aside(damaged)
                return state, progress
            logging.warning("checkpoint %d is damaged (%s); taking the one before", step, damages[0])
            damaged.append(step)
            state = None  # frees the devices for the next one: memory may not hold two states
        raise UserError(
            f"none of the checkpoints {damaged} in {self._folder} can be read; move them away to start anew"
        )

    def _read(self, step: int, abstract_state: Any) -> tuple[Any, dict, str | None]:
        """Returns (state, progress, description of the damage or None). No process waits for others: one may fail."""
        path = self._folder / str(step)
        handler = ocp.StandardCheckpointHandler()
        try:
            saved = named_leaves(handler.metadata(path / "state"))
            _check_fits(step, saved, named_leaves(abstract_state))
            state = handler.restore(path / "state", args=ocp.args.StandardRestore(abstract_state))
            progress = _progress(path)
        except (UserError, *NOT_DAMAGE):
            raise
        except Exception as error:  # orbax and tensorstore raise many kinds
            return None, {}, _reason(error)
        finally:
            handler.close()
        if any(saved[name].dtype != leaf.dtype for name, leaf in named_leaves(abstract_state).items()):
            progress.pop("checksum", None)
        return state, progress, None

    def _set_aside(self, steps: list[int]) -> None:
        """Renames checkpoints to damaged-<step>, so that the run can save these steps again; deletes nothing."""
        if steps and processes.is_first():
            for step in steps:
                names = itertools.chain([f"damaged-{step}"], (f"damaged-{step}-{n}" for n in itertools.count(2)))
                new = next(name for name in names if not (self._folder / name).exists())
                (self._folder / str(step)).rename(self._folder / new)
        if steps:
            processes.exchange(None)  # all wait for the first
            self._manager.reload()

    def wait(self) -> None:
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        with self._writing():
            self._manager.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            waited = (jax.errors.JaxRuntimeError, TimeoutError)  # a wait for other processes failed
            cause = error
            while isinstance(cause, waited) and cause.__context__:  # perhaps after an error of this process
                cause = cause.__context__
            if isinstance(cause, waited):
                raise
            steps = ocp.utils.checkpoint_steps(self._folder)
            newest = f"that of step {max(steps)} is whole" if steps else "there is none before"
            raise UserError(
                f"no checkpoint can be written to {self._folder} ({_reason(cause)}); {newest}. Make room or give "
                "the processes the right to write there; the same command then continues"
            ) from error


def checksum(state: Any) -> int:
    """Returns a checksum that is the same on any mesh; a change of any one bit changes it."""
    sums = jax.device_get(_sums_of_bits(jax.tree.leaves(state)))
    return sum((2 * place + 1) * int(bits) for place, bits in enumerate(sums)) % 2**32


@jax.jit
def _sums_of_bits(leaves: list[jax.Array]) -> list[jax.Array]:
    """Sums all leaves in one program: on a CPU with few cores, the devices of several programs would block."""
    return [_sum_of_bits(leaf) for leaf in leaves]


def _sum_of_bits(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    return jnp.sum(jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}"), dtype=jnp.uint32)


def _check_fits(step: int, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises a UserError at the first array that differs in name or shape."""
    for name in sorted(saved.keys() | wanted.keys()):
        shapes = [str(tuple(side[name].shape)) if name in side else "none" for side in (saved, wanted)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"checkpoint {step} does not fit the config's model and optimizer: `{name}` has the shape {shapes[0]} "
                f"in the checkpoint, {shapes[1]} in the config; use the run's own config, or another --workdir"
            )


def _reason(error: Exception) -> str:
    """Returns the operating system's message if the error holds an error code, else the error's first line."""
    number = re.search(r"os_error_code='(\d+)'", str(error)) or re.search(r"\[Errno (\d+)\]", str(error))
    return os.strerror(int(number[1])) if number else (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def load_params(workdir: str | os.PathLike, shardings: Callable[[Any], Any] | None = None) -> Any:
    """Returns the model's parameters of the newest checkpoint (their EMA if the run kept one).

    Parameters that belong to terms of the objective are left out.

    Args:
      workdir: the run's folder.
      shardings: tree of shapes -> tree of shardings for the arrays; None gives numpy arrays.

    Raises:
      UserError: the folder holds no finished checkpoint, or the newest one is damaged.
    """
    params = _of_newest(workdir, lambda folder: _params(folder / "state", shardings))
    return params if shardings is not None else jax.tree.map(np.asarray, params)


def newest_progress(workdir: str | os.PathLike) -> dict[str, Any]:
    """Returns what the newest checkpoint of a workdir was saved with; raises as `load_params`."""
    return _of_newest(workdir, _progress)


def _progress(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "progress" / "metadata").read_text())


def _of_newest(workdir: str | os.PathLike, read: Callable[[Path], Any]) -> Any:
    folder = Path(workdir).absolute() / "checkpoints"
    steps = ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []
    if not steps:
        raise UserError(f"{workdir} holds no checkpoint; expected a workdir that `vlm_jax.train` wrote")
    try:
        return read(folder / str(max(steps)))
    except NOT_DAMAGE:
        raise
    except Exception as error:  # orbax and tensorstore raise many kinds
        raise UserError(
            f"checkpoint {max(steps)} in {folder} cannot be read ({_reason(error)}); move it away to use another"
        ) from error


def _params(path: Path, shardings: Callable[[Any], Any] | None) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        meta = checkpointer.metadata(path).item_metadata
        host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        placed = lambda leaf, place=host: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
        target = jax.tree.map(placed, dict(meta))
        key = "ema" if meta["ema"] else "params"
        if shardings is not None:
            model = of_model(target[key])
            target[key] = target[key] | jax.tree.map(placed, model, shardings(model))
        return of_model(checkpointer.restore(path, target)[key])


def check_same_config(path: Path, settings: Mapping[str, Any]) -> None:
    """Writes config.json, or raises a UserError if the workdir's config differs in keys other than `FREE`."""
    if any(other != settings for other in processes.exchange(settings)):
        raise UserError("the processes were given different configs; give all of them the same flags")
    kept = processes.exchange(read_kept(path) if processes.is_first() else None)[0]
    if kept is None:
        if processes.is_first():
            write_json(path, settings)
        return
    if changed := _changed(kept, settings):
        key, before, now = changed
        raise UserError(
            f"{path.parent} holds a run with config.{key} = {before}, not {now}; "
            "give the same config to continue it, or another --workdir"
        )


def finished(workdir: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns results.json of a run of the same config that has ended in the workdir, else None."""
    results = None
    if processes.is_first():
        results, before = read_kept(workdir / "results.json"), read_kept(workdir / "config.json")
        step = (results or {}).get("step")
        ended = type(step) is int and (workdir / "checkpoints" / str(step)).is_dir()
        if not ended or before is None or _changed(before, settings):
            results = None
    return processes.exchange(results)[0]


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Returns the first key outside of `FREE` that differs, with both values."""
    before, now = flatten(before), flatten(now)
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and not any(key == free or key.startswith(f"{free}.") for free in FREE):
            return key, before.get(key), now.get(key)
    return None


def params_sha256(params: Any) -> str:
    """Returns the hex digest of every parameter's name, dtype, shape and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name, leaf in sorted(named_leaves(params).items()):
        digest.update(f"{name}:{np.dtype(leaf.dtype)}:{tuple(leaf.shape)}".encode())
        for piece in processes.pieces(leaf):
            digest.update(np.ascontiguousarray(piece).tobytes())
    return digest.hexdigest()
