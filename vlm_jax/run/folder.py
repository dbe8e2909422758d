"""One run a folder: a lock file names the run that works there, config.json the settings of what is there.

The next run takes the lock over if its holder has ended.
"""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import jax

from vlm_jax.config import flatten
from vlm_jax.data.files import naming, read_kept, write_json
from vlm_jax.errors import UserError, check_on_disk
from vlm_jax.run import processes

NAME = "lock"
PROGRESS = "progress/progress.json"  # of an unfinished evaluation
PULSE_SECONDS = 3.0  # a holder on another host touches its lock this often


@contextlib.contextmanager
def locked(folder: str | os.PathLike, together: bool = True) -> Iterator[None]:
    """Makes the folder, and holds it for this run; the first process holds it for all that work `together`.

    The lock of the operating system ends with its process. Another host's may not be visible here: the pulse of the
    file then tells whether its holder lives.

    Raises:
      UserError: another run holds the folder; on every process.
    """
    check_on_disk(folder, "folder")
    folder, held, mistake = Path(folder), contextlib.ExitStack(), None
    exchange = processes.exchange if together else lambda mistake: [mistake]
    if processes.is_first() or not together:
        try:
            made = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            if made:  # what fails at once leaves no empty folder
                held.callback(_remove_if_empty, folder)
            held.enter_context(_lock(folder / NAME))
        except UserError as error:
            mistake = str(error)
        except OSError as error:
            mistake = f"{error.filename or folder} cannot be written ({error.strerror}); give another folder"
    with held:
        if mistake := exchange(mistake)[0]:
            raise UserError(mistake)
        yield


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    file, exclusive = _open(path)
    with file:
        before = _holder(file)
        if before:
            elsewhere = before["host"] != socket.gethostname() or not exclusive
            if elsewhere and _beats(file):
                raise _busy(path, before)
            print(f"{path.parent}: taking over from {_told(before)}, which has ended")
        own = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with naming(path):
            file.seek(0)
            file.truncate()
            file.write(json.dumps(own))
            file.flush()
        ended = threading.Event()
        pulse = threading.Thread(target=_pulse, args=(file, ended), daemon=True)
        pulse.start()
        try:
            yield
        finally:
            ended.set()
            pulse.join()
            path.unlink(missing_ok=True)


def _open(path: Path) -> tuple[IO[str], bool]:
    """Returns (the open lock file, whether the operating system locks it); raises if another process has locked it."""
    while True:
        file = path.open("a+", errors="replace")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            exclusive = True
        except BlockingIOError:
            with file:
                raise _busy(path, _holder(file)) from None
        except OSError:  # a file system without locks
            exclusive = False
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):  # not one that its holder just removed
                return file, exclusive
        file.close()


def _holder(file: IO[str]) -> dict[str, str] | None:
    """Returns host, pid and since of a lock file; None if it holds nothing that can be read."""
    file.seek(0)
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(file.read(10_000))
        if isinstance(found, dict) and {"host", "pid", "since"} <= found.keys():
            return found
    return None


def _beats(file: IO[str]) -> bool:
    """Returns whether the file is touched or removed within some pulses."""
    before, deadline = os.fstat(file.fileno()), time.monotonic() + 4 * PULSE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(PULSE_SECONDS / 4)
        now = os.fstat(file.fileno())
        if (now.st_mtime_ns, now.st_nlink) != (before.st_mtime_ns, before.st_nlink):
            return True
    return False


def _pulse(file: IO[str], ended: threading.Event) -> None:
    while not ended.wait(PULSE_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(file.fileno())


def claim(folder: Path, settings: Mapping[str, Any], mark: str) -> str | None:
    """Writes config.json into a folder, or returns what else the folder holds, as a part of a sentence.

    Settings without results or progress are replaced: nothing is lost.

    Args:
      folder: exists.
      settings: JSON-able.
      mark: a key of `settings` that tells an evaluation or adaptation from other runs, "evaluator" or "adapter".
    """
    before, what = read_kept(folder / "config.json"), {"evaluator": "an evaluation", "adapter": "an adaptation"}[mark]
    results, progress = ((folder / name).exists() for name in ("results.json", PROGRESS))
    if before is None and results:
        return "results of something else; choose another --out"
    if before is not None and mark not in before:
        return f"something else than {what} (a training run?); choose another --out"
    old, new = flatten(before or settings), flatten(settings)
    for key in [*new, *old]:
        if old.get(key) != new.get(key) and (results or progress):
            change = f"{key} = {old.get(key)!s:.80}, not {new.get(key)!s:.80}"
            return f"{what} with {change}; choose another --out or delete it"
    if before != settings:
        write_json(folder / "config.json", settings)
    return None


@contextlib.contextmanager
def released_on_failure(folder: Path) -> Iterator[None]:
    """Removes settings and progress if the block fails, so that other settings can follow.

    An interrupt, an error of the operating system and a lost process leave them: the same command continues.
    """
    try:
        yield
    except (OSError, jax.errors.JaxRuntimeError):
        raise
    except Exception:
        (folder / "config.json").unlink(missing_ok=True)
        shutil.rmtree((folder / PROGRESS).parent, ignore_errors=True)
        raise


def _told(holder: dict[str, str] | None) -> str:
    if holder is None:
        return "another process"
    pid, host, since = (str(holder[key])[:60].encode(errors="replace").decode() for key in ("pid", "host", "since"))
    return f"process {pid} on {host} (since {since})"


def _busy(path: Path, holder: dict[str, str] | None) -> UserError:
    return UserError(f"{path.parent} is in use by {_told(holder)}; wait until it ends, or give another folder")
