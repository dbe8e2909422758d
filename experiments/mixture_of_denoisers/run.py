"""Span corruption, prefixes, and UL2's mixture of both, at matched cost: filling in and continuing held-out texts.

    PYTHONPATH=. python experiments/mixture_of_denoisers/run.py [--seeds=0,1,2] [--runs=runs/denoisers]

Trains what is not trained yet (a run that is there is taken as it is), evaluates all, writes results.json and
comparison.png beside this file, prints the README's table.
"""

import argparse
import json
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import vlm_jax
from configs import ul2
from vlm_jax import config, evaluators
from vlm_jax.train import train

HERE = pathlib.Path(__file__).parent
MODELS = {
    "encoder-decoder, spans": ("tiny", "t5"),
    "encoder-decoder, prefixes": ("tiny", "prefix"),
    "encoder-decoder, mixture": ("tiny", "ul2"),
    "decoder, spans": ("prefix-tiny", "t5"),
    "decoder, prefixes": ("prefix-tiny", "prefix"),
    "decoder, mixture": ("prefix-tiny", "ul2"),
}
TASKS = {  # name: (mean span, rate, the mixture's mode token)
    "fill in: spans of 3, 15 %": (3, 0.15, "[NLU]"),
    "fill in: spans of 3, 50 %": (3, 0.5, "[NLG]"),
    "continue: a quarter": (None, 0.25, "[S2S]"),
    "continue: a half": (None, 0.5, "[S2S]"),
}


def measure(name, seed, runs):
    """{task: perplexity} of one run, on the texts of held-out concepts."""
    variant, denoisers = MODELS[name]
    settings = config.plain(ul2.get_config(variant, denoisers)) | {"seed": seed}
    workdir = runs / f"{variant}_{denoisers}_{seed}"
    if not (workdir / "results.json").exists():
        train(settings, workdir)
    pretrained = vlm_jax.load(workdir)
    found = {}
    for task, (mean_span, rate, mode) in TASKS.items():
        if denoisers != "ul2":
            mode = None  # it has seen no mode tokens
        ops = settings["data"]["ops"].replace(
            f"denoisers='{denoisers}'", f"denoisers=((({mean_span}, {rate}, {mode!r}), 1),)"
        )
        section = dict(type="denoising", uri="tfds:emoji", split="unseen_concepts", ops=ops, denoisers=[task])
        found[task] = evaluators.build(section)(pretrained).metrics["perplexity"]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/denoisers"))
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    path = HERE / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for seed in seeds:
        for name in MODELS:
            if f"{name} {seed}" not in results:
                results[f"{name} {seed}"] = measure(name, seed, options.runs)
                path.write_text(json.dumps(results, indent=1) + "\n")
    write(results, seeds)


def write(results, seeds):
    """The table and comparison.png: geometric means over seeds, and their range."""
    numbers = {name: {task: [results[f"{name} {seed}"][task] for seed in seeds] for task in TASKS} for name in MODELS}
    mean = lambda values: np.exp(np.mean(np.log(values)))
    digits = lambda value: f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
    show = lambda values: f"{digits(mean(values))} ({digits(min(values))}-{digits(max(values))})"
    lines = [f"| perplexity | {' | '.join(TASKS)} |", "|---" * (len(TASKS) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(map(show, of.values()))} |" for name, of in numbers.items()]
    figure, axes = plt.subplots(1, len(TASKS), figsize=(13, 3), sharey=True, layout="constrained")
    places = np.arange(len(MODELS))[::-1]
    for ax, task in zip(axes, TASKS, strict=True):
        for place, of in zip(places, numbers.values(), strict=True):
            ax.barh(place, mean(of[task]), color=("C2", "C1", "C0")[place % 3])
            ax.plot(of[task], [place] * len(seeds), "k.", markersize=3)
        ax.set_title(task, fontsize=10)
        ax.set_xscale("log")
        ax.set_xlim(10, 10**6)
        ax.set_xlabel("perplexity")
    axes[0].set_yticks(places, list(MODELS))
    figure.savefig(HERE / "comparison.png", dpi=150)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
