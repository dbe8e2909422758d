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
    """(text of the scheduled program, bytes of a device that it takes in all: without codegen, with what aligns them).

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
                ended.put(lowered.compile(compiler_options={**options, **wanted}).memory_analysis())
            except Exception as error:  # raised below
                ended.put(error)

        threading.Thread(target=compile_, daemon=True).start()
        before, text = None, ""
        while ended.empty() and (codegen or not text or text != before):
            time.sleep(0.5)
            before, text = text, _read(folder, "*after_optimizations_after_buffer_assignment.txt")
        outcome = None if ended.empty() else ended.get()
        if isinstance(outcome, Exception):
            raise outcome
        text = _read(folder, "*after_optimizations_after_buffer_assignment.txt")
        if outcome:
            return text, in_all(outcome)
        return text, int(re.search(r"Total bytes: (\d+)", _read(folder, "*memory-usage-report.txt"))[1])


def in_all(memory: Any) -> int:
    """Bytes of `memory_analysis()`, what is donated once."""
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return held + memory.temp_size_in_bytes


def _read(folder: str, pattern: str) -> str:
    return "".join(path.read_text() for path in Path(folder).glob(pattern))
