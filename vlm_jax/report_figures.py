"""The pictures of a report, drawn with matplotlib off screen: curves, galleries, confusions. Readable in grey."""

import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

RC = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "savefig.dpi": 110,
    "text.parse_math": False,  # a class may be called "$"
}
INK, GREY, BAR = "#1a1a1a", "#767676", "#dcdcdc"
LINES = ["-", "--", ":", "-."]
FIRST = ("loss", "lr", "examples_per_second")  # the panels that a reader looks for first


def curves(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: pathlib.Path) -> None:
    """Draws one panel for each training metric, and one for each evaluation metric with a line for each evaluation.

    Args:
      series: metric -> (steps, values); "loss", or "unseen_style/top1" for an evaluation's.
      path: the PNG to write.
    """
    panels: dict[str, dict[str, tuple]] = {}
    for name, line in series.items():
        evaluation, _, metric = name.removeprefix("eval/").partition("/")
        panels.setdefault(metric or evaluation, {})[evaluation if metric else ""] = line
    names = [name for name in FIRST if name in panels] + [name for name in panels if name not in FIRST]
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(3.4 * columns, 2.5 * rows), layout="constrained")
        for i, name in enumerate(names):
            axes = figure.add_subplot(rows, columns, i + 1)
            for j, (label, (steps, values)) in enumerate(panels[name].items()):
                axes.plot(
                    steps, values, LINES[j % len(LINES)], marker="o" if len(steps) < 20 else None, markersize=3,
                    label=label or None, color=INK if j == 0 else f"C{j - 1}", linewidth=1.3,
                )  # fmt: skip
            axes.set_title(name.replace("_", " "))
            axes.set_xlabel("step")
            if any(panels[name]):
                axes.legend(fontsize=8)
        figure.savefig(path)


def gallery(artifacts: Mapping[str, Any], path: pathlib.Path) -> None:
    """Draws pictures, each with its best names, their scores as bars, and a tick at the right name.

    Args:
      artifacts: "gallery/images" uint8 [n, h, w, 3], "gallery/truth" n names, "gallery/names" n lists of names, best
        first, "gallery/scores" float [n, k].
      path: the PNG to write.
    """
    images, scores = artifacts["gallery/images"], np.asarray(artifacts["gallery/scores"], np.float64)
    low = min(scores.min(), 0.0)
    columns = min(3, len(images))
    rows = -(-len(images) // columns)
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(3.6 * columns, 1.28 * rows))
        for i, image in enumerate(images):
            row, column = divmod(i, columns)
            left, top = column / columns, 1 - (row + 1) / rows
            axes = figure.add_axes((left, top + 0.1 / rows, 0.27 / columns, 0.8 / rows))
            axes.imshow(image)
            axes.axis("off")
            axes = figure.add_axes((left + 0.29 / columns, top + 0.04 / rows, 0.68 / columns, 0.92 / rows))
            _names(axes, artifacts["gallery/names"][i], artifacts["gallery/truth"][i], scores[i] - low, scores[i])
        figure.savefig(path)


def _names(axes: Any, names: Sequence[str], truth: str, lengths: np.ndarray, scores: np.ndarray) -> None:
    longest = max(lengths.max(), 1e-6)
    for j, (name, length, score) in enumerate(zip(names, lengths, scores, strict=True)):
        right = name == truth
        axes.barh(-j, length / longest, height=0.82, color="#b9cfe4" if right else BAR, hatch="///" if right else None,
                  edgecolor="#9dbbd8" if right else BAR, linewidth=0)  # fmt: skip
        weight = "bold" if right else "normal"
        text = f"✓ {_short(name)}" if right else _short(name)
        axes.text(0.015, -j, text, va="center", color=INK, weight=weight, fontsize=8)
        axes.text(1.16, -j, f"{score:.2f}", va="center", ha="right", color=GREY, fontsize=7)
    if truth not in names:
        axes.text(0.015, -len(names), f"✗ {_short(truth, 40)}", va="center", color=INK, fontsize=8, style="italic")
    axes.set_xlim(0, 1.16)
    axes.set_ylim(-len(names) - 0.5, 0.5)
    axes.axis("off")


def confusions(artifacts: Mapping[str, Any], path: pathlib.Path, most: int = 18) -> None:
    """Draws pairs of classes that were mixed up: the right one, an arrow with the count, what it was taken for.

    Args:
      artifacts: "confusions" [(true, predicted, count)]; "class_pictures/names" and "class_pictures/images" uint8
        [n, h, w, 3] where available.
      path: the PNG to write.
      most: how many pairs are drawn.
    """
    pairs = artifacts["confusions"][:most]
    names, images = (artifacts.get(f"class_pictures/{key}", ()) for key in ("names", "images"))
    pictures = dict(zip(names, images, strict=True))
    columns = min(3, len(pairs))
    rows = -(-len(pairs) // columns)
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(3.6 * columns, 1.5 * rows))
        for i, (true, predicted, count) in enumerate(pairs):
            row, column = divmod(i, columns)
            left, bottom = column / columns, 1 - (row + 1) / rows
            for name, at, ink in ((true, 0.0, INK), (predicted, 0.44, GREY)):
                axes = figure.add_axes((left + at / columns, bottom + 0.34 / rows, 0.4 / columns, 0.62 / rows))
                axes.axis("off")
                if name in pictures:
                    axes.imshow(pictures[name])
                else:
                    axes.text(0.5, 0.5, "(no picture)", ha="center", va="center", fontsize=8, color=GREY)
                figure.text(left + (at + 0.2) / columns, bottom + 0.3 / rows, textwrap.fill(_short(name, 38), 21),
                            ha="center", va="top", fontsize=8, color=ink)  # fmt: skip
            middle = left + 0.42 / columns
            figure.text(middle, bottom + 0.65 / rows, "→", ha="center", va="center", fontsize=13, color=INK)
            if count > 1:
                figure.text(middle, bottom + 0.48 / rows, f"×{count}", ha="center", fontsize=8, color=INK)
        figure.savefig(path)


def _short(text: str, width: int = 29) -> str:
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"
