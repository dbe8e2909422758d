"""Several runs or evaluations side by side: results with their intervals, curves, and what differs in their configs."""

import html
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from vlm_jax import command
from vlm_jax.config import flatten
from vlm_jax.data.files import read_json, replacing
from vlm_jax.errors import UserError
from vlm_jax.report import about
from vlm_jax.report.page import series
from vlm_jax.report.values import format_interval, format_value, interval, is_share, spoken

CHANCE = (
    "In brackets: the 95 % confidence interval. Where the intervals of two runs overlap, the difference may be chance."
)
SHOWN = 40  # metrics in the figure


class Run(NamedTuple):
    """A run's files.

    Attributes:
      name: the end of its path, as long as names differ.
      results: of results.json.
      curves: of metrics.jsonl, see `report.series`.
      settings: of config.json, flattened.
      about: of run.json.
    """

    name: str
    results: dict[str, Any]
    curves: dict[str, tuple[list[float], list[float]]]
    settings: dict[str, Any]
    about: dict[str, str]

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
        "differences": {k: values for k, values in found.items() if len(said(values)) > 1 or len(values) < len(runs)},
    }


def text(runs: Sequence[Run], compared: dict[str, Any]) -> str:
    """Returns the comparison as text: a table of results, and one of the settings that differ."""
    head = [run.name for run in runs]
    lines = [command.table([["", *head], *([name, *_cells(runs, name)] for name in compared["results"])])]
    if compared["intervals"]:
        lines.append(CHANCE)
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


def _settings(runs: Sequence[Run], values: dict[str, Any], width: int) -> list[str]:
    shown = lambda value: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    cells = (shown(values[run.name]) if run.name in values else "-" for run in runs)
    return [cell if len(cell) <= width else f"{cell[: width - 1]}…" for cell in cells]


def _settings_of(path: pathlib.Path) -> dict[str, Any]:
    try:
        return flatten(read_json(path))
    except RecursionError:
        raise UserError(f"{path} is nested too deeply for a config") from None
