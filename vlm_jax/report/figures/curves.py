"""Curves of metrics over training steps."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.ticker import PercentFormatter

from vlm_jax.errors import UserError
from vlm_jax.report.figures import style
from vlm_jax.report.figures.style import GREY, INK, Picture
from vlm_jax.report.values import is_share

Line = tuple[Sequence[float], Sequence[float]]  # steps and values

LINES = ["-", "--", ":", "-."]
FIRST = ("loss", "lr", "examples_per_second")  # the panels that a reader looks for first


@style.styled()
def curves(series: Mapping[str, Line]) -> Picture:
    """Draws a panel for each training metric, and for each evaluation metric with a line for each evaluation.

    Args:
      series: metric -> (steps, values). "loss" is a training metric, "unseen_style/top1" an evaluation's.
        `report.series(workdir)` reads the series of a run.
    """
    if not series:
        raise UserError("there is nothing to draw: the series are empty")
    panels: dict[str, dict[str, Line]] = {}
    for name, line in series.items():
        evaluation, _, metric = name.removeprefix("eval/").partition("/")
        panels.setdefault(metric or evaluation, {})[evaluation if metric else ""] = line
    return _drawn(panels)


@style.styled()
def compared(runs: Mapping[str, Mapping[str, Line]]) -> Picture:
    """Draws a panel for each metric that two runs or more have, with a line for each run.

    Args:
      runs: name of a run -> its series, see `curves`.
    """
    panels: dict[str, dict[str, Line]] = {}
    for run, series in runs.items():
        for name, line in series.items():
            panels.setdefault(name, {})[run] = line
    shared = {name: lines for name, lines in panels.items() if len(lines) > 1}
    if not shared:
        raise UserError("there is nothing to draw: no metric has a series in two runs")
    return _drawn(shared)


def _drawn(panels: Mapping[str, Mapping[str, Line]]) -> Picture:
    names = [name for name in FIRST if name in panels] + [name for name in panels if name not in FIRST]
    rows, columns = style.grid(len(names), 3)
    picture = Picture(figsize=(3.4 * columns, 2.5 * rows), layout="constrained")
    for i, name in enumerate(names):
        axes = picture.add_subplot(rows, columns, i + 1)
        for j, (label, (steps, values)) in enumerate(panels[name].items()):
            axes.plot(
                steps, values, LINES[j % len(LINES)], marker="o" if len(steps) < 20 else None, markersize=3,
                label=style.short(label, 30) or None, color=INK if j == 0 else f"C{j - 1}", linewidth=1.3,
            )  # fmt: skip
        axes.set_title(name.replace("_", " ").replace("/", " "))
        axes.set_xlabel("step")
        seen = np.concatenate([values for _, values in panels[name].values()])
        seen = seen[np.isfinite(seen)]
        if is_share(name):
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        elif len(seen):
            axes.ticklabel_format(axis="y", useOffset=False)
            axes.set_title(
                f"{seen.min():.4g} to {seen.max():.4g}", loc="right", fontsize=8, weight="normal", color=GREY
            )
        if any(panels[name]):
            axes.legend()
    return picture
