"""Plans the configs of the papers' sizes on slices of 256 chips. See README.md here."""

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np

from experiments import study

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
    """Runs one plan in its own process; returns the plan without the parameter table, and the seconds taken."""
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
    """The share of FSDP's gathered and reduce-scattered bytes that other work can hide."""
    fsdp = [one for one in row["collectives"] if one["axes"] == ["fsdp"] and one["kind"] in KINDS]
    total = sum(one["bytes"] for one in fsdp)
    return sum(one["bytes"] for one in fsdp if one["asynchronous"]) / total if total else 1.0


def name(row):
    return " ".join([row["config"], *row["flags"]])


def plans(rows):
    """All plans, as a markdown table."""
    head = (
        "config", "slice", "fsdp x tensor", "GiB: parameters, optimizer, batch, temporaries", "of", "fits",
        "largest bound, ms", "best MFU", "FSDP bytes beside work", "replicated", "wall / CPU s",
    )  # fmt: skip
    lines = []
    for row in rows:
        cells = [name(row), row["topology"], f"{row['fsdp']} x {row['tensor']}"]
        seconds = f"{row['wall_seconds']:.0f} / {row['cpu_seconds']:.0f}"
        if "failed" in row:
            lines.append([*cells, f"exit status {row['failed']}", *[""] * 6, seconds])
            continue
        cells.append(" + ".join(f"{number / 2**30:.2f}" for number in row["memory"].values()))
        cells += [f"{row['chip']['hbm'] / 2**30:.0f}", "yes" if row["fits"] else "no"]
        if row["compiled"]:
            bound = max(row["bounds"], key=row["bounds"].get)
            cells += [f"{bound} {row['seconds'] * 1e3:,.0f}", f"{row['mfu']:.1%}", f"{beside(row):.1%}"]
            cells.append("nothing" if not row["replicated"] else "; ".join(row["replicated"]))
        else:
            cells += [""] * 4
        lines.append([*cells, seconds])
    return study.markdown(head, lines)


def compact(rows):
    """The plans of all configs as shipped, for the project's README."""
    lines = []
    for row in rows:
        if not row["flags"]:
            gib = f"{sum(row['memory'].values()) / 2**30:.1f} of {row['chip']['hbm'] / 2**30:.0f}"
            where = f"`{row['config']}`", row["topology"], f"{row['fsdp']} x {row['tensor']}"
            lines.append([*where, gib, f"{row['mfu']:.0%}", f"{row['seconds']:.3f}"])
    head = "config", "slice", "fsdp x tensor", "GiB of a chip", "best MFU", "seconds a step, at least"
    return study.markdown(head, lines)


def traffic(rows):
    """The traffic between chips of CLIP L/14, as a markdown table: MB sent beside work and waited for."""
    rows = [row for row in rows if row["config"] == "clip.py:L/14" and "--codegen" not in row["flags"]]
    lines = []
    for kind, *axes in sorted({(one["kind"], *one["axes"]) for row in rows for one in row["collectives"]}):
        cells = []
        for row in rows:
            sent = {True: 0.0, False: 0.0}
            for one in row["collectives"]:
                if (one["kind"], *one["axes"]) == (kind, *axes):
                    sent[one["asynchronous"]] += one["bytes"] / 1e6
            cells.append(f"{sent[True]:,.1f} + {sent[False]:,.1f}")
        lines.append([f"{kind} over {' x '.join(axes)}", *cells])
    return study.markdown(
        ["MB sent, beside work + waited for", *(" ".join([row["topology"], *row["flags"]]) for row in rows)], lines
    )


def table(results):
    return f"{plans(results)}\n\n{traffic(results)}"


def plot(results):
    rows = [row for row in results if row.get("compiled") and "--codegen" not in row["flags"]]
    figure, (left, right) = study.subplots(1, 2, size=(11, 5), sharey=True)
    places = np.arange(len(rows))
    share = lambda key: np.array([100 * row["memory"][key] / row["chip"]["hbm"] for row in rows])
    before = np.zeros(len(rows))
    for shade, key in zip(study.SHADES, rows[0]["memory"], strict=True):
        left.barh(places, share(key), left=before, color=shade, label=key, **study.BAR)
        before += share(key)
    left.set_xlim(0, 100)
    left.set_xlabel("% of a chip's memory")
    left.legend(loc="lower right")
    fsdp = right.barh(places, [100 * beside(row) for row in rows], color=study.SHADES[2], **study.BAR)
    mfu = right.plot([100 * row["mfu"] for row in rows], places, **study.DOT)[0]
    right.set_xlim(0, 103)
    right.set_xlabel("%")
    right.legend([fsdp, mfu], ["FSDP's bytes beside work", "best MFU"], loc="lower left")
    left.set_yticks(places, [f"{name(row)}  {row['topology']}" for row in rows])
    left.invert_yaxis()
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="plan what has this in its name, and keep the other results")
    only = parser.parse_args().only
    key = lambda row: (row["config"], row["topology"], row["fsdp"], row["tensor"], tuple(row["flags"]))
    known = {key(row): row for row in study.read("pod_plans", [])}
    for plan in PLANS:
        if only in " ".join(map(str, plan)):
            known[plan] = run(*plan)
            print(f"{plan}: {known[plan]['wall_seconds']:.0f} s", file=sys.stderr)
            study.save("pod_plans", [known[plan] for plan in PLANS if plan in known])
    study.publish("pod_plans", table, plot)
    print(compact(study.read("pod_plans")))


if __name__ == "__main__":
    main()
