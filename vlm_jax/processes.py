"""A run of several processes, one a host: how they find each other, what they agree on, how they end.

Every process runs the same command. One of them may die: the others learn it from their next collective or from its
missing heartbeat, and end too, so that the scheduler can start all of them again.
"""

import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vlm_jax.errors import UserError

HEARTBEAT_SECONDS = 30  # without a sign of life, after which a process counts as dead
LOST = re.compile("Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED")  # what a collective says of a dead peer


@contextmanager
def joined(how: str | None) -> Iterator[None]:
    """Joins this process to the others of the run, for a command's main.

    Args:
      how: None: it is alone; "auto": a TPU slice, Slurm or Open MPI says; or "address:port,processes,index".

    Raises:
      UserError: `how` is neither. Where not all of the processes come, JAX ends the others after five minutes.
    """
    if how:
        start(how)
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        _leave(error)


def start(how: str) -> None:
    """`jax.distributed.initialize`, before anything asks for a device; `how` as of `joined`."""
    seconds = dict(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    try:
        if how == "auto":
            jax.distributed.initialize(**seconds)
        else:
            address, count, index = how.split(",")
            jax.distributed.initialize(address, int(count), int(index), **seconds)
    except ValueError as error:
        raise UserError(
            f"--distributed={how} is not `address:port,processes,index`, or `auto` on a TPU slice or in a job of Slurm "
            f"or Open MPI ({error})"
        ) from error


def _leave(error: Exception) -> None:
    """Ends this process without waiting for the others, as an exit in order would; they notice."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, UserError):
        status, message = 2, error
    elif isinstance(error, jax.errors.JaxRuntimeError) and LOST.search(reason):
        restart = "Start all of them again: they go on from the last checkpoint"
        status, message = 1, f"a process of the run is lost ({reason}). {restart}"
    else:
        traceback.print_exc()
        status, message = 1, reason
    print(f"error: process {jax.process_index()} of {jax.process_count()}: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints, once for all processes."""
    if is_first():
        print(text)


def whole(x: Any) -> np.ndarray:
    """An array, on every process, parts of which are held by others."""
    return np.asarray(x if getattr(x, "is_fully_addressable", True) else multihost_utils.process_allgather(x, True))


def exchange(value: Any) -> list:
    """Every process's JSON-able value, in their order."""
    if jax.process_count() == 1:
        return [value]
    payload = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.int32(len(payload))))
    room = 1 << int(sizes.max()).bit_length()  # a power of two: few shapes are compiled
    rows = multihost_utils.process_allgather(np.pad(payload, (0, room - len(payload))))
    return [json.loads(bytes(row[:size])) for row, size in zip(np.asarray(rows), sizes, strict=True)]


class StopSignal:
    """Remembers SIGTERM (a preemption notice) and SIGINT, so that the loop can save and leave.

    Of several processes any may be told; JAX's preemption service, which then has SIGTERM, makes them agree on a step.
    """

    def __init__(self):
        self._name = None
        self._several = jax.process_count() > 1
        for number in (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember)

    def at(self, step: int) -> str | None:
        """The signal for which the run stops after this step; to be asked at every step."""
        if self._several:
            return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None
        return self._name

    def _remember(self, number, _frame):
        if self._several:
            signal.raise_signal(signal.SIGTERM)
        self._name = signal.Signals(number).name
