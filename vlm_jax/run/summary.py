"""What a run is about to do, in some ten lines."""

import collections
import math
from collections.abc import Mapping
from pathlib import Path

from vlm_jax.data.loader import Loader
from vlm_jax.params.table import named_leaves
from vlm_jax.run import processes
from vlm_jax.run.program import Program

TABLE = "parameters.txt"  # in the workdir: every parameter with its group and sharding
GROUPS = 4  # of these, the largest are shown


def summary(
    program: Program,
    data: str,
    batches: Loader,
    steps: int,
    examples: int,
    flops: Mapping[int | None, float],
    workdir: Path,
    every: Mapping[str, int],
) -> str:
    """Returns the lines to print; the first process writes the table of all parameters into the workdir.

    Args:
      program: of the run.
      data: name of the data set.
      batches: the loader.
      steps: of the run.
      examples: of the run.
      flops: length -> FLOPs of a step on all devices, see `flops.model_flops`.
      workdir: the run's folder.
      every: what is written -> the steps between, such as {"checkpoints": 100}.
    """
    if processes.is_first():
        (workdir / TABLE).write_text(program.table + "\n")
    counts = {name: math.prod(leaf.shape) for name, leaf in named_leaves(program.abstract_state.params).items()}
    groups: dict[str, int] = collections.Counter()
    for name, count in counts.items():
        groups[program.groups[name]] += count
    shown = sorted(groups.items(), key=lambda item: -item[1])
    devices, mean = program.mesh.devices.flat, sum(flops.values()) / len(flops)
    axes = " x ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items())
    rows = [
        ("devices", f"{len(devices)} {devices[0].device_kind}: {axes}"),
        ("data", f"{data}: {batches.num_examples:,} examples, {_batches(batches)}"),
        ("model", f"{type(program.model).__name__}, {sum(counts.values()):,} parameters"),
        *(("", f"{count:13,}  {group}") for group, count in shown[:GROUPS]),
        *([("", f"{'...':>13}  {len(shown) - GROUPS} more groups")] if len(shown) > GROUPS else []),
        ("steps", f"{steps:,}: {examples:,} examples, {examples / batches.num_examples:.3g} epochs"),
        ("FLOPs", f"{_scaled(mean)} a step, {_scaled(mean * steps)} in all"),
        ("writes", f"{workdir}: {', '.join(f'{what} every {n:,} steps' for what, n in every.items())}; {TABLE}"),
    ]
    return "\n".join(f"{name:8}  {text}" for name, text in rows)


def _batches(batches: Loader) -> str:
    if None in batches.lengths:
        return f"{batches.batches_per_epoch:,} batches of {batches.batch_size:,} an epoch"
    sizes = (f"{batches.size_of(length):,} x {length:,}" for length in batches.lengths)
    return f"batches of {', '.join(sizes)} patches"


def _scaled(flops: float) -> str:
    power = min(max(int(math.log10(max(flops, 1))) // 3, 0), 8)
    return f"{flops / 1000**power:.3g} {['', 'k', 'M', 'G', 'T', 'P', 'E', 'Z', 'Y'][power]}FLOP"
