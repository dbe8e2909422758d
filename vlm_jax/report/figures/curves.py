"""Curves of metrics over training steps."""

from collections.abc import Mapping, Sequence

from vlm_jax.errors import UserError
from vlm_jax.report.figures import style
from vlm_jax.report.figures.style import INK, Picture

LINES = ["-", "--", ":", "-."]
FIRST = ("loss", "lr", "examples_per_second")  # the panels that a reader looks for first


@style.styled()
def curves(series: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Picture:
    """Draws a panel for each training metric, and for each evaluation metric with a line for each evaluation.

    Args:
      series: metric -> (steps, values). "loss" is a training metric, "unseen_style/top1" an evaluation's.
        `report.series(workdir)` reads the series of a run.
    """
    if not series:
        raise UserError("there is nothing to draw: the series are empty")
    panels: dict[str, dict[str, tuple]] = {}
    for name, line in series.items():
        evaluation, _, metric = name.removeprefix("eval/").partition("/")
        panels.setdefault(metric or evaluation, {})[evaluation if metric else ""] = line
    names = [name for name in FIRST if name in panels] + [name for name in panels if name not in FIRST]
    rows, columns = style.grid(len(names), 3)
    picture = Picture(figsize=(3.4 * columns, 2.5 * rows), layout="constrained")
    for i, name in enumerate(names):
        axes = picture.add_subplot(rows, columns, i + 1)
        for j, (label, (steps, values)) in enumerate(panels[name].items()):
            axes.plot(
                steps, values, LINES[j % len(LINES)], marker="o" if len(steps) < 20 else None, markersize=3,
                label=label or None, color=INK if j == 0 else f"C{j - 1}", linewidth=1.3,
            )  # fmt: skip
        axes.set_title(name.replace("_", " "))
        axes.set_xlabel("step")
        if any(panels[name]):
            axes.legend()
    return picture
