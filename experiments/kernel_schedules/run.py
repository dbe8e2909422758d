"""Writes table.md: cycles of our attention kernels and of JAX's, per shape, and the matrix unit's bound.

    python experiments/kernel_schedules/run.py [--chip v5e]

Needs the [tpu] extra (libtpu), no TPU; about ten minutes on two cores. Run from the repository's root.
"""

import argparse
import json
import pathlib
import subprocess
import sys

from experiments.kernel_schedules.cases import BATCH, SHAPES

HERE = pathlib.Path(__file__).parent
COLUMNS = ("ours_forward", "flash_forward", "splash_forward", "ours_forward_backward", "flash_forward_backward")


def bound(lq, lk, heads, dim, causal):
    """Forward cycles of the four 128 x 128 units of a v5e at full rate, without padding (causal counted whole)."""
    return BATCH * heads * 4 * lq * lk * dim / (4 * 128 * 128 * 2)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chip", default="v5e")
    chip = parser.parse_args().chip
    cycles = {}
    for column in COLUMNS:
        command = [sys.executable, str(HERE / "tpu_cycles.py"), f"experiments.kernel_schedules.cases:{column}"]
        found = subprocess.run([*command, "--chip", chip, "--json"], capture_output=True, text=True, check=True)
        cycles[column] = json.loads(found.stdout)
    count = lambda column, name: cycles[column][name].get("cycles")
    show = lambda n: f"{n:,.0f}" if n else "does not run"
    ratio = lambda a, b: f"{a / b:.2f}x" if a and b else ""
    lines = [f"Cycles on {chip}, batch {BATCH}, bf16.", ""]
    lines.append(
        "| shape | ours fwd | flash fwd | splash fwd | ratio | bound | ours fwd + bwd | flash fwd + bwd | ratio |"
    )
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        ours, flash, splash, ours2, flash2 = (count(column, name) for column in COLUMNS)
        cells = [show(ours), show(flash), show(splash), ratio(ours, flash), show(bound(*shape))]
        cells += [show(ours2), show(flash2), ratio(ours2, flash2)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    (HERE / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
