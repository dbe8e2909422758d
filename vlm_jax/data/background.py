"""Computes the elements of a sequence ahead of time, in order, in threads or worker processes (Grain)."""

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

import grain
from absl import flags

from vlm_jax.data import worker


class Ahead(Iterator):
    """Iterator over `elements[0], elements[1], ...`; computation starts at once.

    Args:
      elements: `elements[i]` must not depend on other elements; picklable if `workers > 0`.
      workers: number of processes; 0 uses threads of this process.
      threads: number of threads, in this process or in each worker.
    """

    def __init__(self, elements: Sequence[Any], *, workers: int, threads: int):
        # Elements are large batches, so only a few are kept ready.
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads if workers else threads + 1)
        data = grain.MapDataset.source(elements).to_iter_dataset(options)
        self._first = None
        if not workers:
            self._iterator = iter(data)
            self._iterator.start_prefetch()
            return
        if not flags.FLAGS.is_parsed():  # outside of an absl program; grain reads flags when it starts workers
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=1)
        self._iterator = iter(data.mp_prefetch(options, worker_init_fn=_init_worker))
        # Grain starts its workers inside of the first `next`, which a thread calls now.
        running = len(multiprocessing.active_children())
        thread = futures.ThreadPoolExecutor(1)
        with worker.main_module_hidden():
            self._first = thread.submit(next, self._iterator)
            while len(multiprocessing.active_children()) < running + workers and not self._first.done():
                time.sleep(0.01)
        thread.shutdown(wait=False)

    def __next__(self) -> Any:
        if self._first is None:
            return next(self._iterator)
        first, self._first = self._first, None
        return first.result()

    def close(self) -> None:
        """Ends threads and processes."""
        if self._first is not None:
            futures.wait([self._first])
        self._iterator.close()


def _init_worker(index: int, count: int) -> None:
    del index, count
    worker.begin()
