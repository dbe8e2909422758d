"""What the studies share: results.json, the tables of a README, the style of the plots. Their shape: README.md here.

python -m experiments.study [NAME ...]    # the tables and the plot again, from results.json as it is
"""

import hashlib
import importlib
import json
import os
import pathlib
import platform
import re
import sys
from importlib import metadata

HERE = pathlib.Path(__file__).parent
NAMES = sorted(path.parent.name for path in HERE.glob("*/run.py"))
INK, GREY = "#1a1a1a", "#8a8a8a"
SHADES = ("#3d5a80", "#7fa3c7", "#bfd3e6", "#f4f4f4")  # dark to light: they differ in grey, too
BAR = dict(edgecolor=INK, linewidth=0.6)
DOT = dict(marker="o", markersize=3.5, color=INK, markeredgecolor="white", markeredgewidth=0.5, linestyle="")


def read(name, default=None):
    """What results.json of a study holds; `default` where there is none."""
    path = HERE / name / "results.json"
    return json.loads(path.read_text()) if path.exists() else default


def save(name, results):
    (HERE / name / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def fill(name, models, seeds, measure):
    """Adds `measure(model, seed)` to results.json as "model seed", wherever it is not there yet."""
    results = read(name, {})
    for seed in seeds:
        for model in models:
            if f"{model} {seed}" not in results:
                results[f"{model} {seed}"] = measure(model, seed)
                save(name, results)


def sit(name, sitting, found):
    """Adds a sitting to results.json, which is a list of them; one of the same name gives way."""
    save(name, [one for one in read(name, []) if one["name"] != sitting] + [{"name": sitting, **found}])


def machine(*packages):
    """Where something is measured: processor, cores, load, versions of Python and packages."""
    cpu = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text()) if os.name == "posix" else None
    versions = {name: metadata.version(name) for name in packages}
    found = dict(cpu=cpu[1] if cpu else platform.processor(), cores=os.cpu_count(), load=os.getloadavg()[0])
    return found | dict(python=platform.python_version(), packages=versions)


def markdown(head, rows):
    """A table of cells that are text already."""
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)])


def tables(text):
    return re.findall(r"^\|.*(?:\n\|.*)*", text, re.M)


def subplots(*shape, size, **options):
    """(figure, axes) off screen, `size` in inches."""
    from matplotlib.figure import Figure  # late: some studies measure memory, and a child's begins with its parent's

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(*shape, **options)


def digest(results):
    """What plot.png says of the results that it shows."""
    return hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()


def publish(name, table, plot):
    """Puts `table(results)` in the place of the tables of the README's results; writes `plot(results)` to plot.png."""
    import matplotlib

    from vlm_jax.report.figures.style import RC

    results, readme = read(name), HERE / name / "README.md"
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
        publish(study, run.table, run.plot)
