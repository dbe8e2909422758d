"""A run of several processes, one a host: how they find each other, what they agree on, how they end.

Every process runs the same command. One of them may die: the others learn it from their next collective or from its
missing heartbeat, and end too, so that the scheduler can start all of them again.
"""

import functools
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vlm_jax.errors import UserError, told

PIECE_BYTES = 2**26
HEARTBEAT_SECONDS = 30  # without a sign of life, after which a process counts as dead
LOST = re.compile("Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED")  # what a collective says of a dead peer


@contextmanager
def joined(how: str | None, preemptible: bool = False) -> Iterator[None]:
    """Joins this process to the others of the run, for a command's main.

    Args:
      how: None: it is alone; "auto": a TPU slice, Slurm or Open MPI says; or "address:port,processes,index".
      preemptible: SIGTERM does not end it, it asks `StopSignal`.

    Raises:
      UserError: `how` is neither. Where not all of the processes come, JAX ends the others after five minutes.
    """
    if how:
        start(how, preemptible)
    try:
        yield
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        _leave(error)


def joins(preemptible: bool = False) -> Callable:
    """Decorates a command's main, so that it runs `joined` as its flag `--distributed` says."""

    def decorate(main):
        @functools.wraps(main)
        def with_others(argv, values):
            with joined(values.distributed, preemptible):
                return main(argv, values)

        return with_others

    return decorate


def start(how: str, preemptible: bool = False) -> None:
    """`jax.distributed.initialize`, before anything asks for a device; arguments as of `joined`."""
    jax.config.update("jax_enable_preemption_service", preemptible)
    # who is done first may wait long for the others; if one of them dies, its heartbeat ends the waiting
    seconds = dict(heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=24 * 3600)
    try:
        if how == "auto":
            jax.distributed.initialize(**seconds)
        else:
            address, count, index = how.split(",")
            jax.distributed.initialize(
                address, int(count), int(index), cluster_detection_method="deactivate", **seconds
            )
    except ValueError as error:
        raise UserError(
            f"--distributed={how} is not `address:port,processes,index`, or `auto` on a TPU slice or in a job of Slurm "
            f"or Open MPI ({error})"
        ) from error


def _leave(error: Exception) -> None:
    """Ends this process without waiting for the others, as an exit in order would; they notice."""
    message, status = told(error)
    reason = str(error).strip().partition("\n")[0]
    if isinstance(error, jax.errors.JaxRuntimeError) and LOST.search(reason):
        restart = "Start all of them again: they go on from the last checkpoint"
        message = f"a process of the run is lost ({reason}). {restart}"
    if "--debug" in sys.argv:
        traceback.print_exc()
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


def pieces(x: Any) -> Iterator[np.ndarray]:
    """As `whole`, in pieces along the first axis: a model may be larger than a device."""
    if getattr(x, "is_fully_addressable", True) or not x.ndim:
        yield whole(x)
        return
    rows = max(1, PIECE_BYTES * len(x) // max(x.nbytes, 1))
    for start in range(0, len(x), rows):
        yield whole(x[start : start + rows])


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
    """Remembers SIGTERM (a preemption notice) and SIGINT, so that a loop can save and leave.

    Of several processes any may be told; JAX's preemption service, which then has SIGTERM, makes them agree on a step.
    """

    def __init__(self):
        self._name = None
        self._several = jax.process_count() > 1
        if self._several:
            signal.signal(signal.SIGINT, lambda *_: signal.raise_signal(signal.SIGTERM))
        else:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._remember)

    def at(self, step: int) -> str | None:
        """The signal for which the run stops after this step; to be asked at every step."""
        if self._several:
            return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None
        return self._name

    def close(self) -> None:
        """From now on the signals end the process."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _remember(self, number, _frame):
        self._name = signal.Signals(number).name
