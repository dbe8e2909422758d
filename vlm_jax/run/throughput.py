"""The speed of a run: examples a second, waits for data, MFU, memory; and profiler traces."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from vlm_jax.data.loader import Loader
from vlm_jax.errors import UserError
from vlm_jax.run import processes
from vlm_jax.run.chips import chip_of


class Throughput:
    """Counts seconds of training and seconds of waiting for data, over all restarts.

    Compiling and evaluating do not count.

    Args:
      batches: the loader.
      seconds, data_wait: seconds counted before this start.
    """

    def __init__(
        self,
        batches: Loader,
        seconds: float = 0.0,
        data_wait: float = 0.0,
    ):
        self._batches, self._examples, self._flops = batches, 0, 0.0
        self._chip = chip_of(jax.devices())
        self._seconds, self._data_wait = seconds, data_wait
        self._start = time.perf_counter()

    def count(self, examples: int, flops: float) -> None:
        """Counts a step, with its examples and model FLOPs on all devices."""
        self._examples += examples
        self._flops += flops

    def metrics(self) -> dict[str, float]:
        """Returns numbers for the log, over the steps since this start.

        `examples_per_second`, `data_wait_fraction`; on accelerators also `mfu` (model FLOPs utilisation: Chowdhery et
        al. 2022, arXiv:2204.02311, appendix B) and the peak memory of a device so far, `hbm_gib` and `hbm_fraction`.
        Waits and memory are those of this process; other processes may have larger numbers.
        """
        seconds = time.perf_counter() - self._start
        numbers = {
            "examples_per_second": self._examples / seconds,
            "data_wait_fraction": self._batches.wait_seconds / seconds,
        }
        if self._chip:
            numbers["mfu"] = self._flops / seconds / (self._chip.flops * jax.device_count())
        memory = jax.local_devices()[0].memory_stats() or {}  # a CPU has none
        if "peak_bytes_in_use" in memory:
            numbers["hbm_gib"] = memory["peak_bytes_in_use"] / 2**30
            numbers["hbm_fraction"] = memory["peak_bytes_in_use"] / memory.get("bytes_limit", math.inf)
        return numbers

    def progress(self) -> dict[str, float]:
        """Returns the counts for the checkpoint; a restart continues from them."""
        seconds = self._seconds + time.perf_counter() - self._start
        return {"seconds": seconds, "data_wait": self._data_wait + self._batches.wait_seconds}

    @contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start


class Profile:
    """Traces some steps into `workdir/profile`, for XProf and https://ui.perfetto.dev.

    Args:
      workdir: the run's folder.
      steps: "100:105" traces steps 100 to 104; "" traces none.
    """

    def __init__(self, workdir: Path, steps: str = ""):
        self._folder, self._tracing = workdir / "profile", False
        if jax.process_count() > 1:
            self._folder /= f"process_{jax.process_index()}"
        first, colon, end = steps.partition(":")
        if steps and not (colon and first.isdecimal() and end.isdecimal() and 0 < int(first) < int(end)):
            raise UserError(f"config.profile.steps is `{steps}`; expected first:end, e.g. 100:105 for steps 100 to 104")
        self._steps = range(int(first), int(end)) if steps else range(0)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Returns a context for all the work of a step."""
        if number in self._steps and not self._tracing:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # a trace of every Python call would be slow and large
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True, profiler_options=options)
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def after(self, number: int, metrics: dict[str, jax.Array]) -> None:
        """Ends the trace after its last step; waits for that step's `metrics`."""
        if self._tracing and number == self._steps[-1]:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
            processes.say(f"trace: {self._folder}")
