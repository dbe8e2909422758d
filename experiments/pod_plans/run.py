"""Plans configs of the papers' sizes on slices that could train them.

    PYTHON_WITH_LIBTPU experiments/pod_plans/run.py

See README.md here.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
V5E, V5P, V6E = "v5e:16x16", "v5p:4x8x8", "v6e:16x16"
PLANS = (  # config, slice, fsdp, tensor, flags
    ("clip.py:B/32", V5E, 8, 1, ()),
    ("clip.py:B/16", V5E, 8, 1, ()),
    ("clip.py:L/14", V5E, 16, 1, ()),
    ("clip.py:L/14", V5P, 16, 1, ()),
    ("clip.py:L/14", V6E, 16, 1, ()),
    ("siglip.py:B/16", V5E, 8, 1, ()),
    ("siglip.py:L/16", V5E, 16, 1, ()),
    ("siglip.py:So400m/14", V5E, 16, 1, ()),
    ("siglip.py:So400m/14", V6E, 16, 1, ()),
    ("lit.py:g/14", V5E, 16, 1, ()),
    ("cappa.py:B/16", V5E, 8, 1, ()),
    ("cappa.py:L/14", V5E, 16, 1, ()),
    ("ul2.py:20b", V6E, 64, 4, ()),
    ("clip.py:L/14", V5E, 16, 1, ("XLA's defaults",)),
    ("clip.py:L/14", V5P, 16, 1, ("XLA's defaults",)),
    ("clip.py:L/14", V6E, 16, 1, ("XLA's defaults",)),
    ("clip.py:L/14", V5E, 16, 1, ("--codegen",)),
    ("clip.py:L/14", V6E, 16, 1, ("--codegen",)),
    ("ul2.py:20b", V6E, 64, 4, ("--codegen",)),
)
PLAIN = """
import runpy
from vlm_jax.plan import train_step
train_step.compiler_options = lambda device: {}
runpy.run_module("vlm_jax.plan", run_name="__main__", alter_sys=True)
"""
KINDS = ("all-gather", "reduce-scatter")  # of FSDP


def run(config, topology, fsdp, tensor, flags):
    """One plan in a process of its own: what it says, less the parameter table, and the seconds that it takes."""
    program = ["-c", PLAIN] if "XLA's defaults" in flags else ["-m", "vlm_jax.plan", *flags]
    command = [sys.executable, *program, f"--config=configs/{config}", f"--topology={topology}", "--json"]
    command += [f"--config.mesh.fsdp={fsdp}", f"--config.mesh.tensor={tensor}"]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    row = dict(config=config, topology=topology, fsdp=fsdp, tensor=tensor, flags=flags, wall_seconds=wall)
    row["cpu_seconds"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    try:
        plan = json.loads(done.stdout)
    except ValueError:
        return row | dict(failed=done.returncode)
    return row | {key: value for key, value in plan.items() if key != "table"}


def beside(row):
    """Of the bytes that FSDP gathers and reduce-scatters, the share that something could hide."""
    fsdp = [one for one in row["collectives"] if one["axes"] == ["fsdp"] and one["kind"] in KINDS]
    total = sum(one["bytes"] for one in fsdp)
    return sum(one["bytes"] for one in fsdp if one["asynchronous"]) / total if total else 1.0


def table(rows):
    """The rows as markdown."""
    heads = (
        "config", "slice", "fsdp x tensor", "GiB: parameters, optimizer, batch, temporaries", "of", "fits",
        "largest bound, ms", "best MFU", "FSDP bytes beside work", "replicated", "wall / CPU s",
    )  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [" ".join([row["config"], *row["flags"]]), row["topology"], f"{row['fsdp']} x {row['tensor']}"]
        seconds = f"{row['wall_seconds']:.0f} / {row['cpu_seconds']:.0f}"
        if "failed" in row:
            said = f"exit status {row['failed']}"
            lines.append(f"| {' | '.join([*cells, said, *[''] * 6, seconds])} |")
            continue
        cells.append(" + ".join(f"{number / 2**30:.2f}" for number in row["memory"].values()))
        cells += [f"{row['chip']['hbm'] / 2**30:.0f}", "yes" if row["fits"] else "no"]
        if row["compiled"]:
            bound = max(row["bounds"], key=row["bounds"].get)
            cells += [f"{bound} {row['seconds'] * 1e3:,.0f}", f"{row['mfu']:.1%}", f"{beside(row):.1%}"]
            cells.append("nothing" if not row["replicated"] else "; ".join(row["replicated"]))
        else:
            cells += [""] * 4
        lines.append(f"| {' | '.join([*cells, seconds])} |")
    return "\n".join(lines)


def compact(rows):
    """The plans of all configs as shipped, for the project's README."""
    lines = [
        "| config | slice | fsdp x tensor | GiB of a chip | best MFU | seconds a step, at least |",
        "|" + "---|" * 6,
    ]
    for row in rows:
        if not row["flags"]:
            cells = [f"`{row['config']}`", row["topology"], f"{row['fsdp']} x {row['tensor']}"]
            cells.append(f"{sum(row['memory'].values()) / 2**30:.1f} of {row['chip']['hbm'] / 2**30:.0f}")
            cells += [f"{row['mfu']:.0%}", f"{row['seconds']:.3f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def traffic(rows):
    """What the chips of CLIP L/14 say to each other, as markdown: MB sent beside work and waited for."""
    rows = [row for row in rows if row["config"] == "clip.py:L/14" and "--codegen" not in row["flags"]]
    lines = [
        f"| MB sent, beside work + waited for | {' | '.join(' '.join([r['topology'], *r['flags']]) for r in rows)} |"
    ]
    lines.append("|" + "---|" * (len(rows) + 1))
    kinds = sorted({(one["kind"], *one["axes"]) for row in rows for one in row["collectives"]})
    for kind, *axes in kinds:
        cells = []
        for row in rows:
            sent = {True: 0.0, False: 0.0}
            for one in row["collectives"]:
                if (one["kind"], *one["axes"]) == (kind, *axes):
                    sent[one["asynchronous"]] += one["bytes"] / 1e6
            cells.append(f"{sent[True]:,.1f} + {sent[False]:,.1f}")
        lines.append(f"| {kind} over {' x '.join(axes)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--table", action="store_true", help="print that of results.json, plan nothing")
    arguments.add_argument("--only", default="", help="plan what has this in its name, and keep the other results")
    given = arguments.parse_args()
    results = HERE / "results.json"
    rows = json.loads(results.read_text()) if results.exists() else []
    key = lambda row: (row["config"], row["topology"], row["fsdp"], row["tensor"], tuple(row["flags"]))
    known = {key(row): row for row in rows}
    for plan in () if given.table else PLANS:
        if given.only in " ".join(map(str, plan)):
            known[plan] = run(*plan)
            print(f"{plan}: {known[plan]['wall_seconds']:.0f} s", file=sys.stderr)
            rows = [known[plan] for plan in PLANS if plan in known]
            results.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows), traffic(rows), compact(rows), sep="\n\n")


if __name__ == "__main__":
    main()
