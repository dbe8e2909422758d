"""Shared code of the studies: results.json, tables of a README, verdicts, style of plots. See README.md here.

python -m experiments.study [NAME ...]    # rewrites tables, plot and verdicts from results.json, without measuring
"""

import hashlib
import importlib
import json
import os
import pathlib
import platform
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from typing import Any, NamedTuple

HERE = pathlib.Path(__file__).parent
NAMES = sorted(path.parent.name for path in HERE.glob("*/run.py"))
INK, GREY = "#1a1a1a", "#8a8a8a"
SHADES = ("#3d5a80", "#7fa3c7", "#bfd3e6", "#f4f4f4")  # dark to light: they differ in grey, too
BAR = dict(edgecolor=INK, linewidth=0.6)
ROUNDING = 1e-9  # so that rounding decides no comparison
DOT = dict(marker="o", markersize=3.5, color=INK, markeredgecolor="white", markeredgewidth=0.5, linestyle="")


def read(name, default=None):
    """Returns the contents of a study's results.json; `default` if there is no such file."""
    path = HERE / name / "results.json"
    return json.loads(path.read_text()) if path.exists() else default


def save(name, results):
    (HERE / name / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def fill(name, models, seeds, measure):
    """Adds `measure(model, seed)` to results.json as "model seed", for each missing pair."""
    results = read(name, {})
    for seed in seeds:
        for model in models:
            if f"{model} {seed}" not in results:
                results[f"{model} {seed}"] = measure(model, seed)
                save(name, results)


def sit(name, sitting, found):
    """Adds a sitting to results.json, a list of sittings; replaces a sitting of the same name."""
    save(name, [one for one in read(name, []) if one["name"] != sitting] + [{"name": sitting, **found}])


def machine(*packages):
    """Describes this machine: processor, cores, load, versions of Python and packages."""
    cpu = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text()) if os.name == "posix" else None
    versions = {name: metadata.version(name) for name in packages}
    found = dict(cpu=cpu[1] if cpu else platform.processor(), cores=os.cpu_count(), load=os.getloadavg()[0])
    return found | dict(python=platform.python_version(), packages=versions)


class Number(NamedTuple):
    """A mean over seeds, and the standard deviation over seeds, 0 for one seed."""

    mean: float
    spread: float = 0.0


def number(values: Iterable[float]) -> Number:
    """The mean and the standard deviation of the seeds' values."""
    values = list(values)
    return Number(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)


def over(results: Mapping, model: str, seeds: Iterable[int], value: Callable[[Any], float]) -> Number | None:
    """The number of a model from `value(results["model seed"])` of each seed; None if a seed lacks it."""
    try:
        return number(value(results[f"{model} {seed}"]) for seed in seeds)
    except KeyError:
        return None


def above(a: Number | None, b: Number | None) -> bool | None:
    """Whether a's mean exceeds b's by more than twice the larger spread; None if a number is missing."""
    if a is None or b is None:
        return None
    return a.mean - b.mean > 2 * max(a.spread, b.spread) + ROUNDING


def rivals(a: Number | None, b: Number | None) -> bool | None:
    """Whether b is not above a; None if a number is missing."""
    worse = above(b, a)
    return None if worse is None else not worse


def verdict(*comparisons: bool | None) -> str:
    """The verdict on a claim that holds if all comparisons hold; a comparison is None if its numbers are missing."""
    if None in comparisons:
        return "not run"
    if all(comparisons):
        return "reproduced"
    return "partly reproduced" if any(comparisons) else "not reproduced"


def claims(verdicts: Mapping[str, str]) -> str:
    """The table of a study's verdicts."""
    return markdown(["claim", "verdict"], [[claim, found] for claim, found in verdicts.items()])


def record(name: str, verdicts: Mapping[str, str]) -> None:
    """Replaces a study's verdicts in the file that the catalogue reads."""
    from vlm_jax.catalogue import VERDICTS  # imported late, as in `subplots`

    known = json.loads(VERDICTS.read_text()) | {name: verdicts}
    VERDICTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def markdown(head, rows):
    """A markdown table of cells, which are strings."""
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)])


def tables(text):
    return re.findall(r"^\|.*(?:\n\|.*)*", text, re.M)


def subplots(*shape, size, **options):
    """(figure, axes) off screen, `size` in inches."""
    from matplotlib.figure import Figure  # late: some studies measure a child's memory, which starts at its parent's

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(*shape, **options)


def digest(results):
    """The checksum of results that plot.png holds."""
    return hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()


def publish(name, table, plot, verdicts=None):
    """Writes a study's plot and verdicts, and replaces the tables of its README.

    Args:
      name: the study's name.
      table, plot, verdicts: results -> the text of the tables, a figure, {claim: verdict}.
    """
    import matplotlib

    from vlm_jax.report.figures.style import RC

    results, readme = read(name), HERE / name / "README.md"
    if verdicts:  # before the tables: a table may read the catalogue, which refuses a claim without a row
        record(name, verdicts(results))
    head, mark, text = readme.read_text().partition("\n## Result\n")
    shown, rest, verdict = text.partition("\n## Verdict\n")
    new, old = tables(table(results)), tables(shown)
    if len(new) != len(old) or not mark or not rest:
        raise SystemExit(
            f"{readme}: its Result has {len(old)} tables, {name}/run.py makes {len(new)}; put | in each place"
        )
    for block, before in zip(new, old, strict=True):
        shown = shown.replace(before, block, 1)
    readme.write_text(head + mark + shown + rest + verdict)
    with matplotlib.rc_context(RC | {"axes.axisbelow": True, "text.parse_math": True}):
        plot(results).savefig(HERE / name / "plot.png", metadata={"results": digest(results)})
    print(table(results))


if __name__ == "__main__":
    for study in sys.argv[1:] or NAMES:
        run = importlib.import_module(f"experiments.{study}.run")
        publish(study, run.table, run.plot, getattr(run, "verdicts", None))
