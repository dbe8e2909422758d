"""Live curves of a run in a notebook, redrawn below the cell during training.

    with live.curves("runs/mine"):
        train(config, "runs/mine")

A thread reads metrics.jsonl; `train` knows nothing of the thread.
"""

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence

from vlm_jax import report
from vlm_jax.errors import UserError
from vlm_jax.report import figures


@contextlib.contextmanager
def curves(
    workdir: str | os.PathLike, metrics: Sequence[str] = ("loss", "top1"), seconds: float = 5.0
) -> Iterator[None]:
    """Shows `figures.curves` of a run's metrics.jsonl, updated until the body ends and once afterwards.

    Args:
      workdir: the run's folder, which need not exist yet.
      metrics: the metrics shown; "top1" shows the top1 of every evaluation.
      seconds: between two updates.

    Raises:
      UserError: IPython is not installed, so this is no notebook.
    """
    try:
        from IPython.display import DisplayHandle
    except ImportError:
        raise UserError("live curves are for notebooks; elsewhere, --config.log.tensorboard=True shows them") from None
    handle, seen, done = DisplayHandle(), {}, threading.Event()

    def draw() -> None:
        found = {name: line for name, line in report.series(workdir).items() if name.split("/")[-1] in metrics}
        if found and found != seen:
            (handle.update if seen else handle.display)(figures.curves(found))
            seen.update(found)

    def watch() -> None:
        while not done.wait(seconds):
            draw()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        draw()
