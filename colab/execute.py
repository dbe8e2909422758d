"""Executes the notebooks, each from top to bottom in a fresh kernel, on a CPU.

    python colab/execute.py [--store] [01_zero_shot ...]

`--store` writes what they show into the files; without it they stay as they are. Needs `pip install -e '.[colab,tpu]'`.
"""

import argparse
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
SECONDS = 1200  # for one cell, of a machine that has other things to do


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs, executed in a copy of what it needs, so that runs do not stay.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    # a test's own XLA_FLAGS are for compiling fast, not for running fast
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    with tempfile.TemporaryDirectory() as folder:
        left_out = shutil.ignore_patterns("runs", "__pycache__")
        for name in ("colab", "configs"):
            shutil.copytree(HERE.parent / name, Path(folder) / name, ignore=left_out)
        where = {"metadata": {"path": str(Path(folder) / "colab")}}
        quiet = ["--log-level=40"]  # a kernel on this machine warns that it does not encrypt
        client = NotebookClient(
            notebook, timeout=SECONDS, kernel_name="python3", resources=where, extra_arguments=quiet
        )
        client.execute(env=environment | {"JAX_PLATFORMS": "cpu"})
    return notebook


def stored(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook as it is kept: without progress bars, which write to stderr, and times of execution."""
    notebook.metadata = {"kernelspec": notebook.metadata.kernelspec, "language_info": {"name": "python"}}
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="those whose names begin so; all")
    parser.add_argument("--store", action="store_true", help="write the outputs into the notebooks")
    given = parser.parse_args()
    for path in sorted(HERE.glob("*.ipynb")):
        if given.names and not path.name.startswith(tuple(given.names)):
            continue
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        notebook = execute(path)
        after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(f"{path.name}: {cpu:.0f} s of CPU, {wall:.0f} s", flush=True)
        if given.store:
            nbformat.write(stored(notebook), path)


if __name__ == "__main__":
    main()
