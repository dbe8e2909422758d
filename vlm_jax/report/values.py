"""Metrics as text to read."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_jax import command

# Numbers of things, not shares.
COUNTS = re.compile(
    r"step|(train_|pixel_|read_|bad_)?examples|(\w+_)?left_out|(identical_)?texts|images|ties|gallery"
    r"|(\w+_)?(questions|regions|pairs)|\w+_labels"
)
SHARES = re.compile(
    r"top\d+|recall@\d+|mean_per_class|accuracy|average_precision|fraction|exact_match|harmonic_mean"
    r"|(^|/)(object|attribute|relation|count|order|foil|text|image|group|pointing|mean_iou|chair_[is]|object_recall)$"
    r"|(^|/)(chance|(harmonic_)?spread)$|(^|/)chance/"
)


def is_count(name: str) -> bool:
    """Returns whether a metric is a number of things."""
    return COUNTS.fullmatch(name.rsplit("/", 1)[-1]) is not None or name.startswith("data/bad/")


def is_share(name: str) -> bool:
    """Returns whether a metric is a share, in [0, 1]."""
    return not is_count(name) and SHARES.search(name) is not None


def format_value(name: str, value: Any) -> str:
    """Returns a metric as text to read: shares in percent, counts whole, other numbers to four digits."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    if is_count(name):
        return f"{value:,.0f}"
    if is_share(name):
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def interval(name: str, results: Mapping[str, Any]) -> tuple[float, float] | None:
    """Returns the 95 % interval of a metric of results.json; None if it has none."""
    found = results.get(f"{name}/interval")
    if not isinstance(found, list) or len(found) != 2 or not all(isinstance(end, int | float) for end in found):
        return None
    return found[0], found[1]


def format_interval(name: str, results: Mapping[str, Any]) -> str:
    """Returns the 95 % interval of a metric of results.json, "13.2 to 18.2 %"; empty if it has none."""
    ends = interval(name, results)
    return f"{format_value(name, ends[0]).removesuffix(' %')} to {format_value(name, ends[1])}" if ends else ""


def format_results(results: Mapping[str, Any]) -> str:
    """Returns results as text to read: a line for each, shares with their intervals, then the notes."""
    rows = []
    for name, value in results.items():
        if not isinstance(value, list):
            interval = format_interval(name, results)
            rows.append([name, format_value(name, value), f"95 % interval {interval}" if interval else ""])
    return "\n".join([command.table(rows), *(f"note{of and f' on {of}'}: {note}" for of, note in notes(results))])


def notes(results: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """Returns (evaluation or "", note) of each note in results.json."""
    named = (name for name in results if name.rsplit("/", 1)[-1] == "notes" and isinstance(results[name], list))
    return [(name.removesuffix("notes").rstrip("/"), note) for name in named for note in map(str, results[name])]


def spoken(metric: str) -> str:
    """Returns a metric's name in words: "image_to_text/recall@1" -> "image → text recall@1"."""
    return re.sub(r"top(\d)", r"top-\1", metric).replace("_to_", " → ").replace("/", " ").replace("_", " ")
