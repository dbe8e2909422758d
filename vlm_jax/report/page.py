"""A run as one page: `workdir/report/index.html`, one file that needs no other and can be mailed.

Reads the files of training and evaluation: run.json, metrics.jsonl, results.json, config.json and artifacts/.
Missing files are skipped: a run that has only begun, or an evaluation alone, has a page, too.
"""

import html
import json
import logging
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_jax.data.files import read_json, read_jsonl, read_kept, replacing, write_json
from vlm_jax.report import about
from vlm_jax.report.values import is_count

CURVES = "Axes of shares begin at 0. The others span the values of the run, which stand above them."


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
    with replacing(f"{stem}.npz") as out:
        np.savez_compressed(out, **arrays)
    write_json(f"{stem}.json", {"name": name, "artifacts": rest})


def load_artifacts(workdir: str | pathlib.Path) -> dict[str, dict[str, Any]]:
    """Returns evaluation -> its artifacts, by flat names: "gallery/images" and so on; leaves out damaged ones."""
    found = {}
    for path in sorted(pathlib.Path(workdir).glob("artifacts/*.json")):
        try:
            saved = read_json(path)
            with np.load(path.with_suffix(".npz")) as arrays:
                found[str(saved["name"])] = {**saved["artifacts"], **arrays}
        except Exception as error:  # numpy, zipfile and zlib raise many kinds
            logging.warning("%s: the artifacts are damaged and left out of the report (%s)", path, error)
    return found


def series(workdir: str | pathlib.Path) -> dict[str, tuple[list[float], list[float]]]:
    """Returns metric -> (steps, values) of a run's metrics.jsonl, for `figures.curves`.

    Counts and evaluations that ran once are left out.
    """
    found: dict[str, tuple[list, list]] = {}
    for entry in read_jsonl(pathlib.Path(workdir) / "metrics.jsonl"):
        for name, value in entry.items():
            if not is_count(name):
                steps, values = found.setdefault(name, ([], []))
                steps.append(entry["step"])
                values.append(value)
    return {name: line for name, line in found.items() if len(line[0]) > 1 or "/" not in name}


def write(workdir: str | pathlib.Path) -> pathlib.Path:
    """Writes the report of the run in `workdir` and returns the path of its index.html."""
    from vlm_jax.report.document import document, figure
    from vlm_jax.report.figures import curves
    from vlm_jax.report.figures.evaluation import pictures_of
    from vlm_jax.report.tables import class_table, data_table, facts_table, results_tables, run_facts

    workdir = pathlib.Path(workdir).absolute()
    folder = workdir / "report"
    folder.mkdir(parents=True, exist_ok=True)
    results = read_kept(workdir / "results.json") or {}
    evaluations = load_artifacts(workdir)
    order = list(dict.fromkeys(key.partition("/")[0] for key in results))
    place = lambda name: order.index(name) if name in order else len(order)
    sections = [facts_table(read_kept(workdir / about.NAME) or {}), results_tables(results), data_table(results)]
    if lines := series(workdir):
        shown = figure(curves(lines), "curves over training steps", "curves")
        sections.append(f"<h2>Training</h2>\n<p>{CURVES}</p>\n{shown}")
    for name, artifacts in sorted(evaluations.items(), key=lambda item: place(item[0])):
        shown = []
        for kind, heading, text, picture in pictures_of(artifacts):
            drawn = figure(picture, f"{name}: {heading.lower()}", f"{name}/{kind}")
            shown.append(f"<section><h3>{heading}</h3>\n<p>{text}</p>\n{drawn}</section>")
        shown.append(class_table(artifacts))
        if any(shown):
            sections.append("\n".join([f"<h2>{html.escape(name)}</h2>", *shown]))
    if facts := run_facts(results):
        sections.append(f"<h2>Run</h2>\n{facts_table(facts)}")
    if settings := read_kept(workdir / "config.json"):
        text = html.escape(json.dumps(settings, indent=2, ensure_ascii=False))
        sections.append(f"<h2>Config</h2>\n<pre>{text}</pre>")
    with replacing(folder / "index.html") as out:
        out.write(document(workdir.name, sections).encode("utf-8", "replace"))
    return folder / "index.html"
