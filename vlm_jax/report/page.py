"""A run as one page: `workdir/report/index.html` with its PNGs beside it, nothing loaded from elsewhere.

Reads the files of training and evaluation: metrics.jsonl, results.json, config.json and artifacts/. Missing files are
skipped: a run that has only begun, or an evaluation alone, has a page, too.
"""

import html
import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_jax import command

# Numbers of things, not shares.
COUNTS = re.compile(r"step|(train_|pixel_)?examples|left_out|(identical_)?texts|images|ties|\w+_labels|\w+_pairs")
SHARES = re.compile(
    r"top\d+|recall@\d+|mean_per_class|accuracy|average_precision|fraction|exact_match"
    r"|(^|/)(object|attribute|order|chance)$"
)
OF_THE_RUN = ("train", "data")  # prefixes in results.json that are no evaluations

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1100px; margin: 2.5em auto; padding: 0 1.5em; }
h1 { font-size: 1.7em; margin: 0; } h2 { font-size: 1.3em; margin: 2.2em 0 .4em; }
h3 { font-size: 1.05em; margin: 1.8em 0 .2em; } p { margin: .3em 0 .6em; color: #555; max-width: 46em; }
img { max-width: 100%; height: auto; display: block; } .wide { overflow-x: auto; }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: 13px; }
table { border-collapse: collapse; margin: .6em 0; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 600; border-bottom: 2px solid #1a1a1a; padding: .25em .9em; }
td { text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; padding: .25em .9em; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
code { font-size: 13px; overflow-wrap: anywhere; white-space: normal; }
@media (max-width: 700px) {
  body { margin: 1.2em auto; padding: 0 1em; }
  .wide img { max-width: none; zoom: .8; }
}
"""


def save_artifacts(workdir: str | pathlib.Path, name: str, artifacts: Mapping[str, Any]) -> None:
    """Writes an evaluation's artifacts into `workdir/artifacts`: arrays to `name.npz`, the rest to `name.json`.

    Args:
      workdir: the run's folder.
      name: the evaluation's name.
      artifacts: name -> array, JSON-able value, or a dict of both. Nothing is written if empty.
    """
    if not artifacts:
        return
    flat = {}
    for key, value in artifacts.items():
        nested = {f"{key}/{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {key: value}
        flat |= nested
    arrays = {key: value for key, value in flat.items() if isinstance(value, np.ndarray)}
    rest = {key: value for key, value in flat.items() if key not in arrays}
    stem = pathlib.Path(workdir) / "artifacts" / re.sub(r"[^\w.-]", "_", name)
    stem.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(f"{stem}.npz", **arrays)
    pathlib.Path(f"{stem}.json").write_text(json.dumps({"name": name, "artifacts": rest}), encoding="utf-8")


def load_artifacts(workdir: str | pathlib.Path) -> dict[str, dict[str, Any]]:
    """Returns evaluation -> its artifacts, by flat names: "gallery/images" and so on."""
    found = {}
    for path in sorted(pathlib.Path(workdir).glob("artifacts/*.json")):
        saved = json.loads(path.read_text(encoding="utf-8"))
        with np.load(path.with_suffix(".npz")) as arrays:
            found[saved["name"]] = saved["artifacts"] | dict(arrays)
    return found


def series(workdir: str | pathlib.Path) -> dict[str, tuple[list[float], list[float]]]:
    """Returns metric -> (steps, values) of a run's metrics.jsonl, for `figures.curves`.

    Counts and evaluations that ran once are left out; a line that a kill cut short ends the file.
    """
    found: dict[str, tuple[list, list]] = {}
    path = pathlib.Path(workdir) / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            break
        for name, value in entry.items():
            if not _is_count(name):
                steps, values = found.setdefault(name, ([], []))
                steps.append(entry["step"])
                values.append(value)
    return {name: line for name, line in found.items() if len(line[0]) > 1 or "/" not in name}


def write(workdir: str | pathlib.Path) -> pathlib.Path:
    """Writes the report of the run in `workdir` and returns the path of its index.html."""
    from vlm_jax.report.figures import curves
    from vlm_jax.report.figures.evaluation import pictures_of

    workdir = pathlib.Path(workdir).absolute()
    folder = workdir / "report"
    folder.mkdir(parents=True, exist_ok=True)
    results = _read_json(workdir / "results.json")
    evaluations = load_artifacts(workdir)
    order = list(dict.fromkeys(key.partition("/")[0] for key in results))
    place = lambda name: order.index(name) if name in order else len(order)
    sections = [_results_tables(results), _run_table(results)]
    if lines := series(workdir):
        picture = curves(lines)
        picture.save(folder / "curves.png")
        sections.append("<h2>Training</h2>\n" + _figure(picture, "curves.png", "curves over training steps"))
    for name, artifacts in sorted(evaluations.items(), key=lambda item: place(item[0])):
        slug, shown = re.sub(r"[^\w.-]", "_", name), []
        for kind, heading, about, picture in pictures_of(artifacts):
            file = picture.save(folder / f"{slug}_{kind}.png").name
            shown.append(f"<h3>{heading}</h3>\n<p>{about}</p>\n" + _figure(picture, file, f"{name}: {heading.lower()}"))
        if shown:
            sections.append("\n".join([f"<h2>{html.escape(name)}</h2>", *shown]))
    if settings := _read_json(workdir / "config.json"):
        text = html.escape(json.dumps(settings, indent=2, ensure_ascii=False))
        sections.append(f"<h2>Config</h2>\n<pre>{text}</pre>")
    title = html.escape(workdir.name)
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style></head>\n"
        f"<body>\n<h1>{title}</h1>\n" + "\n".join(filter(None, sections)) + "\n</body>\n</html>\n"
    )
    (folder / "index.html").write_text(page, encoding="utf-8")
    return folder / "index.html"


def format_value(name: str, value: Any) -> str:
    """Returns a metric as text to read: shares in percent, counts whole, other numbers to four digits."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    if _is_count(name):
        return f"{value:,.0f}"
    if SHARES.search(name):
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def format_results(results: Mapping[str, Any]) -> str:
    """Returns results as text to read: a line for each, shares with their intervals, then the notes."""
    rows, notes = [], []
    for name, value in results.items():
        if name.rsplit("/", 1)[-1] == "notes":
            about = name.removesuffix("notes").rstrip("/")
            notes += [f"note{about and f' on {about}'}: {note}" for note in value]
        elif not isinstance(value, list):
            ends = [format_value(name, end) for end in results.get(f"{name}/interval", ())]
            rows.append([name, format_value(name, value), f"95 % interval {' to '.join(ends)}" if ends else ""])
    return "\n".join([command.table(rows), *notes])


def _results_tables(results: Mapping[str, Any]) -> str:
    """Tables with a row for each evaluation; evaluations with metrics in common share a table."""
    rows: dict[str, dict[str, Any]] = {}
    for key, value in results.items():
        name, _, metric = key.partition("/")
        if metric and name not in OF_THE_RUN and not isinstance(value, list):  # an interval, or notes
            rows.setdefault(name, {})[metric] = value
    tables: list[dict[str, dict[str, Any]]] = []
    for name, row in rows.items():
        common = {metric for metric in row if not _is_count(metric)}
        alike = (table for table in tables if any(common & other.keys() for other in table.values()))
        table = next(alike, None)
        if table is None:
            tables.append(table := {})
        table[name] = row
    if not tables:
        return ""
    note = "pixel: the class of the nearest training picture, compared pixel by pixel. The baseline to beat."
    has_pixel = any(metric.startswith("pixel_") for row in rows.values() for metric in row)
    return "<h2>Results</h2>\n" + "\n".join(map(_table, tables)) + (f"<p>{note}</p>" if has_pixel else "")


def _table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Metrics in columns; a baseline's column stands right after the model's."""
    metrics = dict.fromkeys(metric for row in rows.values() for metric in row if metric != "pixel_examples")
    columns = dict.fromkeys(c for metric in metrics for c in (metric, f"pixel_{metric}") if c in metrics)
    head = "".join(f"<th>{html.escape(_spoken(column))}</th>" for column in ["", *columns])
    body = "".join(
        f"<tr><td>{html.escape(name)}</td>"
        + "".join(f"<td>{html.escape(format_value(c, row[c])) if c in row else ''}</td>" for c in columns)
        + "</tr>\n"
        for name, row in rows.items()
    )
    return f'<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>'


def _spoken(metric: str) -> str:
    return re.sub(r"top(\d)", r"top-\1", metric).replace("_to_", " → ").replace("/", " ").replace("_", " ")


def _run_table(results: Mapping[str, Any]) -> str:
    facts = {key: value for key, value in results.items() if "/" not in key or key.split("/")[0] in OF_THE_RUN}
    if not facts:
        return ""
    rows = "".join(
        f"<tr><td>{html.escape(_spoken(key.split('/', 1)[-1]))}</td>"
        f"<td><code>{html.escape(format_value(key, value))}</code></td></tr>\n"
        for key, value in facts.items()
    )
    return f'<h2>Run</h2>\n<div class="wide"><table>{rows}</table></div>'


def _figure(picture: Any, path: str, alt: str) -> str:
    """An image tag; on a phone a wide picture keeps a readable size and scrolls."""
    image = f'<img src="{path}" alt="{html.escape(alt)}">'
    return f'<div class="wide">{image}</div>' if picture.get_figwidth() > 6 else image


def _is_count(name: str) -> bool:
    return COUNTS.fullmatch(name.rsplit("/", 1)[-1]) is not None


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
