"""The memory of a device that runs take."""

from collections.abc import Mapping

import numpy as np

from vlm_jax.report.figures import style
from vlm_jax.report.figures.style import INK, Picture

SHADES = (("#2f5d8a", None), ("#7fa6cb", "///"), ("#c9c9c9", "..."), ("#ececec", "\\\\\\"))


@style.styled()
def memory(plans: Mapping[str, Mapping[str, int]], room: int) -> Picture:
    """Draws a bar for each plan, stacked from its parts, and a line at the device's memory.

    Args:
      plans: name -> part -> bytes of a device, such as `plan.train_step.Plan.memory`; at most four parts.
      room: bytes of a device's memory.
    """
    parts = list(dict.fromkeys(part for held in plans.values() for part in held))
    style.check(0 < len(parts) <= len(SHADES), f"plans of 1 to {len(SHADES)} parts", parts)
    picture = Picture(figsize=(7.5, 1.3 + 0.42 * len(plans)), layout="constrained")
    axes = picture.add_subplot()
    left = np.zeros(len(plans))
    for part, (colour, hatch) in zip(parts, SHADES, strict=False):
        sizes = np.array([held.get(part, 0) for held in plans.values()]) / 2**30
        axes.barh(np.arange(len(plans)), sizes, 0.62, left, color=colour, hatch=hatch, edgecolor=INK, linewidth=0.6,
                  label=part)  # fmt: skip
        left += sizes
    for i, total in enumerate(left):
        axes.annotate(f"{total:.1f}", (total, i), (4, 0), textcoords="offset points", va="center", color=INK)
    axes.axvline(room / 2**30, color=INK, linestyle="--", linewidth=1.4, label=f"a device's {room / 2**30:.0f} GiB")
    axes.set_yticks(np.arange(len(plans)), [style.short(name, 40) for name in plans])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(left.max(), room / 2**30))
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("GiB of a device")
    picture.legend(loc="outside upper center", ncols=len(parts) + 1)
    return picture
