"""What worker processes need: no import of the parent's main module, and an end with their parent."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator


@contextlib.contextmanager
def main_module_hidden() -> Iterator[None]:
    """Hides the main module from spawned processes: they do not need this import, which takes seconds."""
    main = sys.modules["__main__"]
    hidden = {name: vars(main).pop(name) for name in ("__spec__", "__file__") if name in vars(main)}
    main.__spec__ = None
    try:
        yield
    finally:
        vars(main).update(hidden)


def begin() -> None:
    """Ignores Ctrl-C, which the parent handles, and exits once the parent has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
