"""Runs with several processes, one a host: joining, exchanging values, ending together.

Every process runs the same command. If one process dies, the next collective or the missing heartbeat tells the others,
and these end too. The scheduler can then restart all processes.
"""

import functools
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vlm_jax.errors import UserError, told

PIECE_BYTES = 2**26
HEARTBEAT_SECONDS = 30  # a process without a heartbeat for this time counts as dead
LOST = re.compile("Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED")  # a collective's error: a peer is dead


@contextmanager
def joined(how: str | None, preemptible: bool = False) -> Iterator[None]:
    """Joins this process to the others of the run, for a command's main.

    If some processes do not come, JAX ends the others after five minutes.

    Args:
      how: None for a single process; "auto" on a TPU slice, under Slurm or Open MPI; or "address:port,processes,index".
      preemptible: SIGTERM does not end the process; the run asks `StopSignal`.

    Raises:
      UserError: `how` is none of these.
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
    """Decorates a command's main: runs it under `joined` with the value of `--distributed`."""

    def decorate(main):
        @functools.wraps(main)
        def with_others(argv, values):
            with joined(values.distributed, preemptible):
                return main(argv, values)

        return with_others

    return decorate


def start(how: str, preemptible: bool = False) -> None:
    """Calls `jax.distributed.initialize`; must run before any use of devices. Arguments as for `joined`."""
    jax.config.update("jax_enable_preemption_service", preemptible)
    # the first process to finish may wait long for the others; if one dies, its missing heartbeat ends the wait
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
    """Ends this process at once; a normal exit would wait for the others. The others notice."""
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
    """Returns whether this is the first process, which writes the shared files."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints once, on the first process."""
    if is_first():
        print(text)


def whole(x: Any) -> np.ndarray:
    """Returns a distributed array as a whole numpy array, on every process."""
    return np.asarray(x if getattr(x, "is_fully_addressable", True) else multihost_utils.process_allgather(x, True))


def pieces(x: Any) -> Iterator[np.ndarray]:
    """Yields `whole(x)` in pieces along the first axis: a model may be larger than a device."""
    if getattr(x, "is_fully_addressable", True) or not x.ndim:
        yield whole(x)
        return
    rows = max(1, PIECE_BYTES * len(x) // max(x.nbytes, 1))
    for start in range(0, len(x), rows):
        yield whole(x[start : start + rows])


def exchange(value: Any) -> list:
    """Returns the JSON-able values of all processes, in process order."""
    if jax.process_count() == 1:
        return [value]
    payload = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.int32(len(payload))))
    room = 1 << int(sizes.max()).bit_length()  # a power of two, so that few shapes are compiled
    rows = multihost_utils.process_allgather(np.pad(payload, (0, room - len(payload))))
    return [json.loads(bytes(row[:size])) for row, size in zip(np.asarray(rows), sizes, strict=True)]


def check_equal(values: Mapping[str, Any], what: str) -> None:
    """Raises UserError if the processes have different values, name -> JSON-able value; `what` names them."""
    seen = exchange(dict(values))
    for index, other in enumerate(seen):
        differ = [name for name in seen[0] | other if seen[0].get(name) != other.get(name)]
        if differ:
            raise UserError(
                f"process {index} of {len(seen)} has other {what} than the first process: `{differ[0]}`; give all "
                "processes the same"
            )


class StopSignal:
    """Remembers SIGTERM (a preemption notice) and SIGINT, so that a loop can save and leave.

    With several processes, any process may get the signal. JAX's preemption service then handles SIGTERM and makes all
    processes agree on a step.
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
        """Returns the signal's name if the run stops after this step, else None; call it at every step."""
        if self._several:
            return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None
        return self._name

    def close(self) -> None:
        """Restores the default handlers: the signals end the process again."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _remember(self, number, _frame):
        self._name = signal.Signals(number).name
