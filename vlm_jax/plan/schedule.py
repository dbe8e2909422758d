"""A program for TPUs as XLA has scheduled it and placed it in memory, without the machine code.

That code takes minutes, nearly all of a compilation, and nothing of a plan depends on it. XLA has no option to leave it
out; so it is asked to write down what it has before, and what it does then is left to itself.
"""

import queue
import re
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax


def schedule(lowered: jax.stages.Lowered, options: Mapping[str, Any], codegen: bool) -> tuple[str, int]:
    """(text of the scheduled program, bytes of a device that it takes in all).

    Args:
      lowered: for TPUs.
      options: of the compiler.
      codegen: whether to wait for the machine code; else the compilation goes on in a thread.

    Raises:
      jax.errors.JaxRuntimeError: what the compiler says until then.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        ended = queue.SimpleQueue()

        def compile_():
            try:
                wanted = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
                lowered.compile(compiler_options={**options, **wanted})
                ended.put(None)
            except jax.errors.JaxRuntimeError as error:
                ended.put(error)

        threading.Thread(target=compile_, daemon=True).start()
        before, text = None, ""
        while ended.empty() and (codegen or not text or text != before):
            time.sleep(0.5)
            before, text = text, _read(folder, "*after_optimizations_after_buffer_assignment.txt")
        error = None if ended.empty() else ended.get()
        if error:
            raise error
        total = re.search(r"Total bytes: (\d+)", _read(folder, "*memory-usage-report.txt"))
        return _read(folder, "*after_optimizations_after_buffer_assignment.txt"), int(total[1])


def _read(folder: str, pattern: str) -> str:
    return "".join(path.read_text() for path in Path(folder).glob(pattern))
