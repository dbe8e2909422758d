"""Runs with several processes, one a host: joining, exchanging values, ending together.

Every process runs the same command. If one process dies, the next collective or the missing heartbeat tells the others,
and these end too. The scheduler can then restart all processes.
"""

import contextlib
import functools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vlm_jax import command
from vlm_jax.errors import UserError, told

PIECE_BYTES = 2**26
JOIN_SECONDS = 20.0  # the other processes wait this long for the first to listen
MEET_SECONDS = 300.0  # all wait this long for each other
HEARTBEAT_SECONDS = 30  # a process without a heartbeat for this time counts as dead
LOST = re.compile("Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED")  # a collective's error: a peer is dead


@contextmanager
def joined(how: str | None, preemptible: bool = False) -> Iterator[None]:
    """Joins this process to the others of the run, for a command's main.

    The others wait `JOIN_SECONDS` for the first process, and all wait `MEET_SECONDS` for the rest.

    Args:
      how: None for a single process; "auto" on a TPU slice, under Slurm or Open MPI; or "address:port,processes,index".
      preemptible: SIGTERM does not end the process; the run asks `StopSignal`.

    Raises:
      UserError: `how` is none of these, the port is in use, or the first process is not there.
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
    given = {}
    try:
        if how != "auto":
            address, count, index = _parts(how)
            given = dict(coordinator_address=address, num_processes=count, process_id=index)
            given |= dict(cluster_detection_method="deactivate")
            reach(address, first=index == 0)  # JAX would wait for minutes, or crash
        elif port := _port_of_first():
            _listen(port, "set JAX_COORDINATOR_PORT for all processes").close()  # JAX would not name it
        with command.doing("waiting for the other processes"), _at_most(MEET_SECONDS, how):
            jax.distributed.initialize(initialization_timeout=int(MEET_SECONDS + 10), **given, **seconds)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(
            f"--distributed={how} is not `address:port,processes,index`, or `auto` on a TPU slice or in a job of Slurm "
            f"or Open MPI ({error})"
        ) from error
    except RuntimeError as error:
        raise UserError(f"--distributed={how}: the processes cannot join ({error})") from error


@contextmanager
def _at_most(seconds: float, how: str) -> Iterator[None]:
    """Ends this process with one line if the block takes longer: JAX would crash."""

    def end():
        told = f"error: --distributed={how}: not all processes came within {seconds:.0f} seconds; start all of them"
        print(told, file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _parts(how: str) -> tuple[str, int, int]:
    """ "host:port,4,0" -> ("host:port", 4, 0); raises ValueError if a part is wrong."""
    address, count, index = how.split(",")
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError(f"`{address}` is no address:port")
    if not 0 <= int(index) < int(count):
        raise ValueError(f"there is no process {index} of {count}; the first is 0")
    return address, int(count), int(index)


def reach(address: str, first: bool) -> None:
    """Checks that "host:port" can be listened at (by the first process), or that the first process listens there.

    Raises:
      UserError: the port is in use, or nothing listens within `JOIN_SECONDS`.
    """
    host, _, port = address.rpartition(":")
    host, port = host.strip("[]"), int(port)
    with contextlib.ExitStack() as opened:
        if first:
            opened.enter_context(_listen(port, "give another port"))
        deadline = time.monotonic() + (JOIN_SECONDS / 4 if first else JOIN_SECONDS)
        while True:
            try:
                socket.create_connection((host, port), timeout=JOIN_SECONDS / 4).close()
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    what = "does not lead to this machine, the first process's" if first else "has no first process"
                    reason = error.strerror or str(error)
                    raise UserError(f"--distributed: {address} {what} ({reason}); check address and port") from error
            time.sleep(0.5)


def _listen(port: int, otherwise: str) -> socket.socket:
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6)
    except OSError as error:
        raise UserError(
            f"--distributed: the first process cannot listen at port {port} ({os.strerror(error.errno)}); "
            f"end what uses it, or {otherwise}"
        ) from error


def _port_of_first() -> int | None:
    """Returns the port at which this process will listen under `auto`; None unless it is the first."""
    try:
        from jax._src.clusters import ClusterEnv  # what `initialize` asks; not public, so it may move
    except ImportError:
        return None
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    find = ClusterEnv.auto_detect_unset_distributed_params
    address, _, index, _ = find(address, None, None, None, None, int(MEET_SECONDS))
    return int(address.rpartition(":")[2]) if address and index == 0 else None


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
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
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
        """Restores the handlers from before: the signals end the process again."""
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _remember(self, number, _frame):
        self._name = signal.Signals(number).name
