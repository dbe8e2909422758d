"""Several runs or evaluations side by side: results with their intervals, curves, and what differs in their configs."""

import html
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vlm_jax import command
from vlm_jax.config import flatten
from vlm_jax.data.files import read_json, replacing
from vlm_jax.errors import UserError
from vlm_jax.evaluators.metrics import paired
from vlm_jax.report import about
from vlm_jax.report.page import load_artifacts, series
from vlm_jax.report.values import format_interval, format_value, interval, is_share, spoken

CHANCE = (
    "In brackets: the 95 % confidence interval. Where the intervals of two runs overlap, the difference may be chance."
)
PAIRED = (
    "Examples that one run has right and the other wrong. p: how often chance alone would split them as unevenly "
    "(McNemar's exact test)."
)
PAIRED_HEAD = ["example by example", "against", "difference", "95 % interval", "gained", "lost", "p"]
SHOWN = 40  # metrics in the figure


class Run(NamedTuple):
    """A run's files.

    Attributes:
      name: the end of its path, as long as names differ.
      results: of results.json.
      curves: of metrics.jsonl, see `report.series`.
      settings: of config.json, flattened.
      about: of run.json.
      right: evaluation -> {place of an example in the data set: whether its name is right}.
    """

    name: str
    results: dict[str, Any]
    curves: dict[str, tuple[list[float], list[float]]]
    settings: dict[str, Any]
    about: dict[str, str]
    right: dict[str, dict[int, bool]]

    @property
    def numbers(self) -> dict[str, float]:
        return {k: v for k, v in self.results.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def read(paths: Sequence[str]) -> list[Run]:
    """Reads runs: folders of `train`, `evaluate` or `adapt`, or their results.json.

    Raises:
      UserError: fewer than two runs, or a folder without results and metrics.
    """
    if len(paths) < 2:
        raise UserError(f"two runs or more can be compared; got {len(paths)}")
    folders = [pathlib.Path(path).expanduser().absolute() for path in paths]
    folders = [path.parent if path.name == "results.json" else path for path in folders]
    for path, folder in zip(paths, folders, strict=True):
        if not any((folder / name).is_file() for name in ("results.json", "metrics.jsonl")):
            raise UserError(f"{path} is no run: it has neither results.json nor metrics.jsonl")
    if len(set(folders)) < len(folders):
        raise UserError("a run is given twice")
    depth = next(n for n in range(1, 1000) if len({folder.parts[-n:] for folder in folders}) == len(folders))
    return [
        Run(
            "/".join(folder.parts[-depth:]),
            read_json(folder / "results.json"),
            series(folder),
            _settings_of(folder / "config.json"),
            read_json(folder / about.NAME),
            _right(folder),
        )
        for folder in folders
    ]


def compare(runs: Sequence[Run]) -> dict[str, Any]:
    """Returns the comparison as JSON, each a dict by run: `results`, `intervals`, `differences` of the settings."""
    metrics = dict.fromkeys(name for run in runs for name in run.numbers)
    of = lambda field, name: {run.name: field(run)[name] for run in runs if name in field(run)}
    intervals = {
        name: {run.name: list(ends) for run in runs if (ends := interval(name, run.results))} for name in metrics
    }
    settings = dict.fromkeys(key for run in runs for key in run.settings)
    found = {key: of(lambda run: run.settings, key) for key in settings}
    said = lambda values: {json.dumps(value, sort_keys=True) for value in values.values()}
    return {
        "runs": {run.name: run.about for run in runs},
        "results": {name: of(lambda run: run.numbers, name) for name in metrics},
        "intervals": {name: values for name, values in intervals.items() if values},
        "paired": _paired(runs),
        "differences": {k: values for k, values in found.items() if len(said(values)) > 1 or len(values) < len(runs)},
    }


def text(runs: Sequence[Run], compared: dict[str, Any]) -> str:
    """Returns the comparison as text: a table of results, and one of the settings that differ."""
    head = [run.name for run in runs]
    lines = [command.table([["", *head], *([name, *_cells(runs, name)] for name in compared["results"])])]
    if compared["intervals"]:
        lines.append(CHANCE)
    if compared["paired"]:
        lines += ["", command.table([PAIRED_HEAD, *_paired_rows(compared)]), PAIRED]
    differences = [[key, *_settings(runs, values, 40)] for key, values in compared["differences"].items()]
    lines += ["", command.table([["settings that differ", *head], *differences])] if differences else []
    return "\n".join(lines)


def page(runs: Sequence[Run], compared: dict[str, Any], out: str | pathlib.Path) -> pathlib.Path:
    """Writes the comparison as one HTML file, or index.html of a folder, and returns its path."""
    from vlm_jax.report import figures
    from vlm_jax.report.document import document, figure, table

    safe = lambda cells: [html.escape(cell) for cell in cells]
    head = ["", *(run.name for run in runs)]
    facts = dict.fromkeys(key for run in runs for key in run.about)
    rows = ([key, *(str(run.about.get(key, "")) for run in runs)] for key in facts)
    wrapped = range(1, len(head))
    sections = [table(safe(head), map(safe, rows), text=wrapped)]
    results = ([spoken(name), *_cells(runs, name)] for name in compared["results"])
    sections.append(f"<h2>Results</h2>\n{table(safe(head), map(safe, results))}")
    if compared["intervals"]:
        sections.append(f"<p>{CHANCE}</p>")
    if compared["paired"]:
        rows = table(safe(PAIRED_HEAD), map(safe, _paired_rows(compared)))
        sections.append(f"<h2>Example by example</h2>\n{rows}\n<p>{PAIRED}</p>")
    shares = {name: of for name, of in compared["results"].items() if is_share(name) and len(of) > 1}
    if shares:
        shown = dict(list(shares.items())[:SHOWN])
        drawn = figures.intervals(shown, {name: compared["intervals"].get(name, {}) for name in shown})
        sections.append(figure(drawn, "shares of the runs with their intervals", "shares"))
    curves = {run.name: run.curves for run in runs if run.curves}
    if any(sum(name in other for other in curves.values()) > 1 for lines in curves.values() for name in lines):
        drawn = figure(figures.compared(curves), "curves of the runs over steps", "curves")
        sections.append(f"<h2>Training</h2>\n{drawn}")
    if compared["differences"]:
        rows = ([key, *_settings(runs, values, 400)] for key, values in compared["differences"].items())
        sections.append(f"<h2>Settings that differ</h2>\n{table(safe(head), map(safe, rows), text=wrapped)}")
    out = pathlib.Path(out).expanduser().absolute()
    out = out / "index.html" if out.is_dir() or not out.suffix else out
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as file:
        file.write(document(" / ".join(head[1:]), sections).encode("utf-8", "replace"))
    return out


def _cells(runs: Sequence[Run], name: str) -> list[str]:
    """A metric of each run, with its interval; empty where a run lacks it."""
    cells = []
    for run in runs:
        ends = format_interval(name, run.results)
        value = format_value(name, run.numbers[name]) if name in run.numbers else ""
        cells.append(f"{value} ({ends})" if ends else value)
    return cells


def _right(folder: pathlib.Path) -> dict[str, dict[int, bool]]:
    """Whether each example's name is right, of every evaluation that kept its predictions."""
    keys = [f"predictions/{name}" for name in ("position", "label", "predicted")]
    kept = {name: own for name, own in load_artifacts(folder).items() if own.keys() >= set(keys)}
    found = {name: [own[key] for key in keys] for name, own in kept.items()}
    return {
        name: dict(zip(position.tolist(), (label == predicted).tolist(), strict=True))
        for name, (position, label, predicted) in found.items()
    }


def _paired(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Evaluation -> run -> how it differs from the first run, on the examples of both."""
    found: dict[str, dict[str, Any]] = {}
    for run in runs[1:]:
        for name, right in run.right.items():
            before = runs[0].right.get(name, {})
            if before.keys() == right.keys():
                both = np.array([[before[place], right[place]] for place in right])
                found.setdefault(name, {})[run.name] = paired(*both.T)._asdict() | {"against": runs[0].name}
    return found


def _paired_rows(compared: dict[str, Any]) -> list[list[str]]:
    rows = []
    for evaluation, of in compared["paired"].items():
        for run, one in of.items():
            low, high = one["interval"]
            points = f"{100 * one['difference']:+.1f}", f"{100 * low:+.1f} to {100 * high:+.1f}"
            counts = str(one["gained"]), str(one["lost"])
            rows.append([f"{run} {evaluation}".strip(), one["against"], *points, *counts, f"{one['p']:.2g}"])
    return rows


def _settings(runs: Sequence[Run], values: dict[str, Any], width: int) -> list[str]:
    shown = lambda value: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    cells = (shown(values[run.name]) if run.name in values else "-" for run in runs)
    return [cell if len(cell) <= width else f"{cell[: width - 1]}…" for cell in cells]


def _settings_of(path: pathlib.Path) -> dict[str, Any]:
    try:
        return flatten(read_json(path))
    except RecursionError:
        raise UserError(f"{path} is nested too deeply for a config") from None
