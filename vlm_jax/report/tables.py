"""Tables of a page: results, counts of the data, classes."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.report.document import table
from vlm_jax.report.values import format_interval, format_value, is_count, notes, spoken

OF_THE_RUN = ("train", "data")  # prefixes in results.json that are no evaluations
PIXEL = "pixel: the class of the nearest training picture, compared pixel by pixel. The baseline to beat."
INTERVAL = "Small numbers: the 95 % confidence interval, from the number of pictures (bootstrap)."
COUNTED = (
    "Counted: examples behind the metrics. Bad: examples that could not be read or decoded; the log names them. Left "
    "out: what the data set holds and the run does not use, because its label is none of the classes, its text is "
    "empty, or it is no example at all. None of them counts as wrong."
)


def results_tables(results: Mapping[str, Any]) -> str:
    """Returns tables with a row for each evaluation; evaluations with metrics in common share a table."""
    rows: dict[str, dict[str, Any]] = {}
    for key, value in results.items():
        name, _, metric = key.partition("/")
        if metric and name not in OF_THE_RUN and not isinstance(value, list):  # an interval, or notes
            rows.setdefault(name, {})[metric] = value
    tables: list[dict[str, dict[str, Any]]] = []
    for name, row in rows.items():
        common = {metric for metric in row if not is_count(metric)}
        alike = (table for table in tables if any(common & other.keys() for other in table.values()))
        found = next(alike, None)
        if found is None:
            tables.append(found := {})
        found[name] = row
    if not tables:
        return ""
    has_pixel = any(metric.startswith("pixel_") for row in rows.values() for metric in row)
    has_interval = any(key.endswith("/interval") for key in results)
    said = [f"<li>{html.escape(f'{of}: ' * (len(rows) > 1 and bool(of)) + note)}</li>" for of, note in notes(results)]
    return "\n".join([
        "<h2>Results</h2>",
        *(_results_table(found, results) for found in tables),
        *([f"<ul>{''.join(said)}</ul>"] if said else []),
        *([f"<p>{INTERVAL}</p>"] if has_interval else []),
        *([f"<p>{PIXEL}</p>"] if has_pixel else []),
    ])  # fmt: skip


def _results_table(rows: Mapping[str, Mapping[str, Any]], results: Mapping[str, Any]) -> str:
    """Metrics in columns; a baseline's column stands right after the model's."""
    apart = ("pixel_examples", "left_out")  # the latter is in `data_table`
    metrics = dict.fromkeys(metric for row in rows.values() for metric in row if metric not in apart)
    columns = dict.fromkeys(c for metric in metrics for c in (metric, f"pixel_{metric}") if c in metrics)

    def cell(name: str, metric: str) -> str:
        if metric not in rows[name]:
            return ""
        interval = format_interval(f"{name}/{metric}", results)
        return html.escape(format_value(metric, rows[name][metric])) + (
            f"<small>{interval}</small>" if interval else ""
        )

    head = [html.escape(spoken(column)) for column in ["", *columns]]
    return table(head, ([html.escape(name), *(cell(name, column) for column in columns)] for name in rows))


def facts_table(facts: Mapping[str, Any]) -> str:
    """Returns a table of names and values."""
    words = lambda value: " ".join(f"<span>{html.escape(word)}</span>" for word in value.split(" "))
    shown = lambda name, value: words(value) if name == "command" else html.escape(str(value))
    rows = [(html.escape(name), f"<code>{shown(name, value)}</code>") for name, value in facts.items()]
    return table((), rows, text=[1]) if rows else ""


def run_facts(results: Mapping[str, Any]) -> dict[str, str]:
    """Returns what results.json says about the run, as text: name -> value."""
    own = lambda key: "/" not in key or key.partition("/")[0] == "train"
    known = ("examples", "left_out", "notes")
    return {
        spoken(key.partition("/")[2] or key): format_value(key, value)
        for key, value in results.items()
        if own(key) and key not in known and not isinstance(value, list)
    }


def data_table(results: Mapping[str, Any]) -> str:
    """Returns a table of how many examples were read, counted, bad and left out, and what these words mean."""
    rows = []
    if bad := {key: value for key, value in results.items() if key.startswith("data/")}:
        read, wrong = bad.get("data/read_examples"), bad.get("data/bad_examples")
        counted = read - wrong if None not in (read, wrong) else None
        kinds = [f"{key.removeprefix('data/bad/')} {value:,.0f}" for key, value in bad.items() if "/bad/" in key]
        rows.append(["training", *map(_count, (read, counted, wrong, bad.get("data/left_out")))])
        rows[-1][3] += f"<small>{html.escape(', '.join(kinds))}</small>" if kinds else ""
    for key, left_out in results.items():
        name, _, metric = key.rpartition("/")
        if metric == "left_out" and name != "data":
            of = f"{name}/" if name else ""
            counted = next((results[of + unit] for unit in ("examples", "images") if of + unit in results), None)
            read = None if counted is None else counted + left_out
            wrong = results.get(f"{of}bad_examples")
            rows.append([html.escape(name or "test"), *map(_count, (read, counted, wrong, left_out))])
    if not rows:
        return ""
    return f"<h2>Data</h2>\n{table(['', 'read', 'counted', 'bad', 'left out'], rows)}\n<p>{COUNTED}</p>"


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def class_table(artifacts: Mapping[str, Any]) -> str:
    """Returns a table with a row for each class: its pictures, how many are right, and all classes it was taken for.

    The rows are the whole confusion matrix. A table of up to 60 rows stands open.
    """
    names = artifacts.get("classes")
    if not names:
        return ""
    if {"predictions/label", "predictions/predicted"} <= artifacts.keys():
        head = ["class", "right", "pictures", "taken for"]
        rows = _named(artifacts["predictions/label"], artifacts["predictions/predicted"], names)
    elif "per_class" in artifacts:
        head, per_class = ["class", "average precision"], np.asarray(artifacts["per_class"], np.float64)
        order = np.argsort(per_class, kind="stable")
        rows = [(html.escape(names[i]), f"{100 * per_class[i]:.1f} %") for i in order if np.isfinite(per_class[i])]
    else:
        return ""
    absent = len(names) - len(rows)
    none = f"; {absent:,} classes without a picture are not shown" if absent else ""
    return (
        f"<h3>Classes</h3>\n<p>The worst first{none}.</p>\n<details{' open' * (len(rows) <= 60)}>"
        f"<summary>{len(rows):,} classes</summary>{table(head, rows, text=[0, 3])}</details>"
    )


def _named(label: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> list[list[str]]:
    pairs, counts = np.unique(np.stack([label, predicted], axis=1), axis=0, return_counts=True)
    pictures = np.bincount(label, minlength=len(names))
    right = np.bincount(label[label == predicted], minlength=len(names))
    taken: dict[int, list[tuple[int, str]]] = {}
    for (true, said), count in zip(pairs.tolist(), counts.tolist(), strict=True):
        if true != said:
            taken.setdefault(true, []).append((count, names[said]))
    order = [i for i in np.lexsort((-pictures, right / np.maximum(pictures, 1))) if pictures[i]]
    listed = lambda i: ", ".join(f"{name} {count}" for count, name in sorted(taken.get(i, ()), key=lambda x: -x[0]))
    return [
        [html.escape(names[i]), f"{100 * right[i] / pictures[i]:.0f} %", f"{pictures[i]:,}", html.escape(listed(i))]
        for i in order
    ]
