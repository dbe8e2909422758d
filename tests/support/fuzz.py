"""Damages every kind of input that the package reads: each is used, or refused by a UserError.

    python -m tests.support.fuzz --mutations=5000            all kinds
    python -m tests.support.fuzz --mutations=5000 tar lock   some kinds

A mutation is drawn from (kind, number), so that a failure can be repeated: `--first=1234 --mutations=1 tar`.
"""

import argparse
import contextlib
import io
import json
import logging
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from tests.support import fuzz_kinds
from tests.support.tensor_files import mutate
from vlm_jax.errors import UserError

SECONDS = 20  # until a mutation counts as a hang
GROWTH = 500 << 20  # bytes
ABSURD = (
    -1, 0, 1, 3, 10**9, 10**12, 2**80, 1e300, float("nan"), float("inf"), "", "a", "16", "../x", "/etc/passwd", "a/b",
    "\0", "\ud800", "x" * 3000, None, [], {}, True, [16], [[[]]], {"a": 1}, [0] * 300,
)  # fmt: skip
NASTY = (
    "\0", "\ufeff", "\ud800", "\u202e", "'", '"', "(", ")", "[", "{", "}", "|", "=", ",", ":", "/", "\\", "..", "%",
    "\n", "\r", "\t", " ", "-1", "0", "9" * 30, "1e999", "nan", "None", "__class__", "é", "😀", "a" * 2000,
)  # fmt: skip


class Hang(BaseException):
    """A mutation took longer than `SECONDS`."""


def damaged(seed: bytes, rng: np.random.Generator) -> bytes:
    """Returns a mutation of a file: of its JSON values, of its text, or of its bytes."""
    choice = rng.random()
    if choice < 0.5:
        try:
            value = json.loads(seed)
        except ValueError:
            value = None
        if isinstance(value, dict | list):
            for _ in range(rng.integers(1, 3)):
                value = _other(value, rng)
            return json.dumps(value).encode()
    if choice < 0.75 and seed.isascii():
        text = seed.decode()
        for _ in range(rng.integers(1, 4)):
            at, nasty = int(rng.integers(len(text) + 1)), NASTY[rng.integers(len(NASTY))]
            text = text[:at] + nasty * int(rng.choice([1, 1, 1, 50])) + text[at + int(rng.integers(4)) :]
        return text.encode("utf-8", "surrogatepass")
    return mutate(seed, rng)


def _other(value: Any, rng: np.random.Generator) -> Any:
    """Returns the JSON value with one of its parts replaced, removed or repeated."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return ABSURD[rng.integers(len(ABSURD))]
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key, changed = keys[rng.integers(len(keys))], value.copy()
    what = rng.random()
    if what < 0.1:
        del changed[key]
    elif what < 0.2:
        other, name = value[keys[rng.integers(len(keys))]], str(ABSURD[rng.integers(len(ABSURD))])
        changed = value | {name: other} if isinstance(value, dict) else [*value, other]
    else:
        changed[key] = _other(value[key], rng)
    return changed


def fuzz(kind: str, folder: Path, mutations: int, first: int = 0) -> list[str]:
    """Returns a line for each fault among the mutations of a kind; prints nothing.

    Args:
      kind: a key of `fuzz_kinds.KINDS`.
      folder: empty.
      mutations, first: the numbers of the mutations.
    """
    logging.disable()
    try:
        with mock.patch("os.fsync"), contextlib.redirect_stdout(io.StringIO()):
            return _fuzz(kind, folder, range(first, first + mutations))
    finally:
        logging.disable(logging.NOTSET)


def _fuzz(kind: str, folder: Path, numbers: range) -> list[str]:
    make, use = fuzz_kinds.KINDS[kind]
    whole, work, faults = folder / "whole", folder / "damaged", []
    whole.mkdir()
    name = make(whole)
    seed = (whole / name).read_bytes()
    shutil.copytree(whole, work)
    if fault := _fault(use, work):
        return [f"{kind} undamaged: {fault}"]
    several, before = len(list(whole.rglob("*"))) > 1, memory()
    for number in numbers:
        rng = np.random.default_rng([*kind.encode(), number])
        if several:  # which a use may change
            shutil.rmtree(work)
            shutil.copytree(whole, work)
        (work / name).write_bytes(damaged(seed, rng))
        if fault := _fault(use, work):
            faults.append(f"{kind} {number}: {fault}")
        if (grown := memory() - before) > GROWTH:
            faults.append(f"{kind} {number}: memory grew by {grown >> 20} MB")
            before += grown
    return faults


def _fault(use, folder: Path) -> str | None:
    """Returns what is wrong with an outcome: another error than UserError, a long message, a hang."""

    def ring(*_):
        raise Hang

    handler = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        use(folder)
    except UserError as error:
        return f"the message has {len(str(error)):,} characters" if len(str(error)) > 5000 else None
    except Hang:
        return f"takes longer than {SECONDS} seconds"
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "vlm_jax" in f.filename] or [place]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]} ({where})"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


def memory() -> int:
    """Returns the largest memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.support.fuzz", description=__doc__)
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(fuzz_kinds.KINDS)}")
    parser.add_argument("--mutations", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    found = []
    for kind in given.kinds or fuzz_kinds.KINDS:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            faults = fuzz(kind, Path(folder), given.mutations, given.first)
        print(
            f"{kind}: {given.mutations} mutations, {len(faults)} faults, {time.monotonic() - began:.1f} s", flush=True
        )
        print(*faults[:20], sep="\n", end="\n" * bool(faults), flush=True)
        found += faults
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
