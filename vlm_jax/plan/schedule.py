"""A TPU program, scheduled and placed in memory by XLA, without the machine code.

The machine code takes minutes, nearly all of a compilation, and a plan does not need it. XLA has no option to skip the
machine code; so XLA dumps the scheduled program first, and the rest of the compilation is left to a thread.
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

SCHEDULED, USED = "*after_optimizations_after_buffer_assignment.txt", "*memory-usage-report.txt"


def schedule(lowered: jax.stages.Lowered, options: Mapping[str, Any], codegen: bool) -> tuple[str, int]:
    """Returns the text of the scheduled program, and all bytes of a device that it takes.

    Without codegen the bytes include alignment.

    Args:
      lowered: for TPUs.
      options: of the compiler.
      codegen: whether to wait for the machine code; else the compilation continues in a thread.

    Raises:
      jax.errors.JaxRuntimeError: the compiler fails before the result is there.
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
        text = report = ""
        while ended.empty() and (codegen or not (_is_whole(text) and report)):
            time.sleep(0.5)
            text, report = _read(folder, SCHEDULED), re.search(r"Total bytes: (\d+)", _read(folder, USED))
        outcome = None if ended.empty() else ended.get()
        if isinstance(outcome, Exception):
            raise outcome
        if outcome:
            return _read(folder, SCHEDULED), in_all(outcome)
        return text, int(report[1])


def in_all(memory: Any) -> int:
    """All bytes of `memory_analysis()`; donated bytes count once."""
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return held + memory.temp_size_in_bytes


def _is_whole(text: str) -> bool:
    """Whether the whole program is written; the entry computation stands last."""
    return "\nENTRY " in text and text.rstrip().endswith("}")


def _read(folder: str, pattern: str) -> str:
    return "".join(path.read_text() for path in Path(folder).glob(pattern))
