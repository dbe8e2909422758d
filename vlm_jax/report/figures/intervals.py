"""Shares with their confidence intervals."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.ticker import PercentFormatter

from vlm_jax.report.figures import style
from vlm_jax.report.figures.style import INK, Picture

MARKS = "os^Dv<>P"


@style.styled()
def intervals(
    shares: Mapping[str, Mapping[str, float]], bounds: Mapping[str, Mapping[str, Sequence[float]]]
) -> Picture:
    """Draws a row for each metric, with a mark for each run and a line over its interval; the axis begins at 0.

    Args:
      shares: metric -> run -> share in [0, 1].
      bounds: metric -> run -> (low, high); may lack some.
    """
    runs = list(dict.fromkeys(run for of in shares.values() for run in of))
    style.check(len(runs) > 0, "at least one share", runs)
    step = 0.7 / len(runs)
    picture = Picture(figsize=(7.2, 0.9 + len(shares) * max(0.3, 0.17 * len(runs) + 0.1)), layout="constrained")
    axes = picture.add_subplot()
    for j, run in enumerate(runs):
        rows = [(i + (j - (len(runs) - 1) / 2) * step, name) for i, name in enumerate(shares) if run in shares[name]]
        values = np.array([shares[name][run] for _, name in rows], np.float64)
        ends = np.array(
            [bounds.get(name, {}).get(run, (value,) * 2) for (_, name), value in zip(rows, values, strict=True)]
        )
        color = INK if j == 0 else f"C{j - 1}"
        apart = np.maximum([values - ends[:, 0], ends[:, 1] - values], 0)
        axes.errorbar(values, [y for y, _ in rows], xerr=apart, fmt=MARKS[j % len(MARKS)], color=color, markersize=4.5,
                      linewidth=1.2, capsize=2.5, label=style.short(run, 40))  # fmt: skip
    axes.set_yticks(
        np.arange(len(shares)), [style.short(name.replace("_", " ").replace("/", " "), 44) for name in shares]
    )
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    picture.legend(loc="outside upper left", ncols=min(len(runs), 3))
    return picture
