"""Cycles of our attention kernels and of JAX's, by `tpu_cycles.py`. See README.md here."""

import argparse

import numpy as np

from experiments import study
from experiments.kernel_schedules import tpu_cycles
from experiments.kernel_schedules.cases import BATCH, SHAPES

CASES = ("ours_forward", "flash_forward", "splash_forward", "ours_forward_backward", "flash_forward_backward")
WANTED = {  # ours over flash_attention, at most
    "ViT-B/16 196": 0.45,
    "ViT-L/14 257": 0.45,
    "text 77": 0.45,
    "So400m/14 729": 0.75,
    "long 2048": 1.0,
}


def bound(lq, lk, heads, dim, causal):
    """Forward cycles of the four 128 x 128 units of a v5e at full rate, without padding (causal counted whole)."""
    return BATCH * heads * 4 * lq * lk * dim / (4 * 128 * 128 * 2)


def cycles(results, case, shape):
    return results[case][shape].get("cycles")


def ratio(results, shape, passes):
    """Our cycles over flash_attention's; None if either kernel does not run."""
    ours, flash = (cycles(results, f"{whose}_{passes}", shape) for whose in ("ours", "flash"))
    return ours / flash if ours and flash else None


def table(results):
    show = lambda n: f"{n:,.0f}" if n else "does not run"
    rows = []
    for shape, sizes in SHAPES.items():
        forward, both = [
            f"{x:.2f}x" if (x := ratio(results, shape, p)) else "" for p in ("forward", "forward_backward")
        ]
        ours, flash, splash, ours2, flash2 = (show(cycles(results, case, shape)) for case in CASES)
        wanted = f"{WANTED[shape]}x" if shape in WANTED else ""
        rows.append([shape, ours, flash, splash, forward, show(bound(*sizes)), ours2, flash2, both, wanted])
    head = (
        "shape",
        "ours fwd",
        "flash fwd",
        "splash fwd",
        "ratio",
        "bound",
        "ours fwd + bwd",
        "flash fwd + bwd",
        "ratio",
    )
    return study.markdown([*head, "wanted"], rows)


def plot(results):
    figure, axes = study.subplots(size=(8, 4))
    places = np.arange(len(SHAPES))
    for i, (passes, label) in enumerate((("forward", "forward"), ("forward_backward", "forward + backward"))):
        values = [ratio(results, shape, passes) or 0 for shape in SHAPES]
        at = places + 0.38 * (i - 0.5)
        bars = axes.barh(at, values, 0.36, color=study.SHADES[2 * i], label=label, **study.BAR)
        axes.bar_label(bars, fmt="%.2f", padding=-26, fontsize=8, color="white" if not i else study.INK)
    for place, shape in enumerate(SHAPES):
        if shape in WANTED:
            label = "wanted, at most" if not place else None
            axes.vlines(WANTED[shape], place - 0.4, place + 0.4, color=study.INK, linewidth=2, label=label)
    axes.set_yticks(places, list(SHAPES))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1)
    axes.set_xlabel("cycles of ours, flash_attention = 1")
    axes.legend(loc="upper right")
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chip", default="v5e")
    chip, target = parser.parse_args().chip, "experiments.kernel_schedules.cases"
    study.save("kernel_schedules", {case: tpu_cycles.measure(f"{target}:{case}", chip) for case in CASES})
    study.publish("kernel_schedules", table, plot)


if __name__ == "__main__":
    main()
