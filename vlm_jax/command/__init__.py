"""Runs a command: flags, progress, the answer as a table or JSON, errors in one line."""

import contextlib
import difflib
import importlib
import json
import math
import multiprocessing
import os
import re
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from absl import app, flags, logging
from tqdm import tqdm

from vlm_jax.command import configs, help_page
from vlm_jax.command.commands import COMMANDS, define
from vlm_jax.errors import UserError, check_on_disk, mendable, told

WIPED = "\r\033[K"  # erases a terminal's line
line: str | None = None  # the command line of this process, as typed
LONG = 5  # seconds until a log (stderr is no terminal) names the running activity


class Answer(NamedTuple):
    """The result of a command.

    Attributes:
      results: all results, JSON-able; non-finite numbers become null.
      text: the results as text.
      status: the process's exit status.
      at_once: ends the process without waiting for its threads.
    """

    results: dict[str, Any]
    text: str
    status: int = 0
    at_once: bool = False


Main = Callable[[Sequence[str], flags.FlagValues], Answer | None]


def run(name: str, main: Main | None = None) -> None:
    """Runs a command with the flags of `sys.argv`; ends the process if the command fails.

    Every error is one line on stderr; the flag `--debug` adds the traceback. Exit status 2: the user can fix the error.
    1: any other error, or a signal stopped `train` after a save. 3: a `plan` does not fit. 130: Ctrl-C. With `--json`
    stdout holds only the answer.

    Args:
      name: a key of `COMMANDS`.
      main: takes the remaining arguments and the flags; None imports the main of the command's module. Among several
        processes only the first returns an answer.
    """
    if {"--help", "--helpshort", "-h"} & set(sys.argv[1:]):
        show(help_page.help_of(name))
        return
    global line
    line = shlex.join(["vlm-jax", name, *sys.argv[1:]])
    define(name, flags.FLAGS)
    # orbax logs every step of a save, and also the errors that it raises; --verbosity=0 shows these logs
    logging.set_verbosity(logging.WARNING)
    shown = lambda record: "orbax" not in record.pathname or logging.get_verbosity() >= logging.INFO
    logging.get_absl_logger().addFilter(shown)
    global interrupts
    interrupts = _Interrupts()
    try:
        app.run(partial(_answer, name, main), flags_parser=partial(parse, name))
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in sys.argv:  # the flags may not be parsed yet
            traceback.print_exc()
        for one in _bars():  # the message gets its own line
            one.close()
        if sys.stderr.isatty():
            print(WIPED, end="", file=sys.stderr)
        # an interrupt inside of a library may come out as another error
        line, status = told(error if interrupts.came is None else KeyboardInterrupt())
        print(f"error: {line}", file=sys.stderr)
        _leave(status)


interrupts = None  # of the running command


class _Interrupts:
    """Raises KeyboardInterrupt at the first Ctrl-C and remembers it; one more, a second later, ends the process.

    A KeyboardInterrupt in a finalizer or a callback is dropped by Python, one in a library perhaps by its `except:`.
    """

    def __init__(self):
        self.came, self._dropped = None, sys.unraisablehook
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # not a job in the background
            signal.signal(signal.SIGINT, self._raise)
            sys.unraisablehook = self._again

    def check(self) -> None:
        """Raises a KeyboardInterrupt that a library has dropped."""
        if self.came is not None:
            raise KeyboardInterrupt

    def _again(self, dropped) -> None:
        if dropped.exc_type is not KeyboardInterrupt:
            return self._dropped(dropped)
        self.came = None
        main = threading.main_thread().ident
        threading.Timer(0.1, signal.pthread_kill, [main, signal.SIGINT]).start()

    def _raise(self, *_):
        if self.came is None:
            self.came = time.monotonic()
            raise KeyboardInterrupt
        if time.monotonic() - self.came > 1:  # a terminal and its shell may both send the first
            _leave(told(KeyboardInterrupt())[1])


def _leave(status: int) -> None:
    """Ends the process and its workers without waiting for threads: some crash, or block, while Python shuts down."""
    for worker in multiprocessing.active_children():
        worker.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Returns rows of cells as aligned lines: the first `left` columns flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.ljust] * left + [str.rjust] * (len(widths) - left)
    cells = lambda row: (side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True))
    return "\n".join("  ".join(cells(row)).rstrip() for row in rows)


def show(text: str) -> None:
    """Prints text for the user; ignores a closed pipe, e.g. after `| head`."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def bar(*args: Any, **options: Any) -> tqdm:
    """Returns a progress bar on stderr, shown after one second; in a log it prints every 15 seconds."""
    return tqdm(*args, mininterval=0.5 if sys.stderr.isatty() else 15, delay=1, **options)


@contextlib.contextmanager
def doing(what: str, seen: bool = True) -> Iterator[None]:
    """Shows on stderr what the program is doing.

    A terminal shows a line that counts the seconds, or the open progress bars. A log gets one line, after `LONG`
    seconds.

    Args:
      what: the activity, e.g. "compiling the train step".
      seen: False shows nothing.
    """
    if interrupts is not None:
        interrupts.check()
    ended, began = threading.Event(), time.monotonic()

    def tell():
        if not sys.stderr.isatty():
            if not ended.wait(LONG) and not _bars():
                print(f"{what} ...", file=sys.stderr, flush=True)
            return
        while not ended.wait(0.5):
            for one in (bars := _bars()):
                one.refresh()
            if not bars:
                print(f"{WIPED}{what}: {time.monotonic() - began:.0f} s", end="\r", file=sys.stderr, flush=True)
        print(WIPED, end="", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    if seen:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if seen:
            thread.join()


def _bars() -> list[tqdm]:
    """Returns the open progress bars; tqdm has no public list of them."""
    with tqdm.get_lock():
        return [one for one in tqdm._instances if hasattr(one, "start_t")]


def _answer(name: str, main: Main | None, argv: Sequence[str]) -> int:
    """Runs the main, shows its answer and returns the exit status."""
    values = flags.FLAGS
    with contextlib.redirect_stdout(sys.stderr) if values.json else contextlib.nullcontext():
        with doing("starting"):
            main = main or importlib.import_module(help_page.module_of(name)).main
        answer = main(argv, values)
    if answer is None:
        return 0
    show(json.dumps(_finite(answer.results), allow_nan=False) if values.json else answer.text)
    if answer.at_once:
        _leave(answer.status)
    return answer.status


def _finite(value: Any) -> Any:
    """Returns the value with None for NaN and infinities, at any depth: JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _underscored(argument: str) -> str:
    """Spells a flag's name with underscores: --allow-outside=true -> --allow_outside=true."""
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else argument


NUMBERS = ((r"invalid literal for int\(\)", "a whole number"), ("could not convert string to float", "a number"))


def _unknown(name: str, flag: str) -> str:
    """Returns what is said of a flag that the command does not have."""
    known = [one.name for one in COMMANDS[name].all()]
    if close := difflib.get_close_matches(flag, known, n=1):
        return f"{name} has no flag --{flag}; did you mean --{close[0]}?"
    other = f"--option={flag}=... sets any other argument; " if "option" in known else ""
    return f"{name} has no flag --{flag}; {other}see vlm-jax {name} --help"


def _unreadable(message: str) -> str:
    """Returns what is said of a config file that cannot be read; the last line of ml_collections' message tells why."""
    reason = message.splitlines()[-1].strip()
    missing = re.search(r"No such file or directory: '(.*)'", reason)
    if not missing:
        return f"--config: {reason}"
    stem = os.path.splitext(os.path.basename(missing[1]))[0]
    known = f"; the config that comes with the package is --config={stem}" if stem in configs.names() else ""
    return f"--config={missing[1]}: there is no such file{known}"


def parse(name: str, argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> Sequence[str]:
    """Parses the flags of a command into `values` and returns the remaining arguments; raises UserError."""
    try:
        left = configs.parse(values, [_underscored(argument) for argument in argv])
    except flags.UnrecognizedFlagError as error:  # absl's suggestions are of its own flags, too
        raise UserError(_unknown(name, error.flagname)) from error
    except (UserError, flags.Error, TypeError, ValueError, OSError, RecursionError) as error:
        message = str(error).removeprefix("flag ")
        for words, expected in NUMBERS:
            message = re.sub(f": {words}.*", f" should be {expected}", message)
        if isinstance(error, OSError):
            message = _unreadable(message)
        elif ": Error whilst parsing config file:" in message:  # ml_collections' words and a traceback
            flag, cause = message.split(": Error whilst")[0], error.__context__.__context__
            message = f"{flag}: {mendable(cause) or f'{type(cause).__name__}: {cause}'}"
        raise UserError(message) from error
    command = COMMANDS[name]
    missing = [f"--{flag.name}" for flag in command.all() if flag.needed and not values[flag.name].value]
    if missing:
        raise UserError(f"{name} needs {', '.join(missing)}; vlm-jax {name} --help has an example")
    for flag in command.all():
        if flag.name in ("workdir", "out") and name != "index":  # an index may be in a store
            check_on_disk(values[flag.name].value or "", f"--{flag.name}")
    if left[1:] and not command.arguments:
        raise UserError(f"{name} takes flags, --name=value, and not `{left[1]}`; see vlm-jax {name} --help")
    return left
