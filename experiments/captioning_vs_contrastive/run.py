"""CLIP, Cap, CapPa and a mixture of denoisers at matched data and compute: naming, captions, probes and foils.

    PYTHONPATH=. python experiments/captioning_vs_contrastive/run.py [--seeds=0,1,2] [--runs=runs/captioning]

Trains what is not trained yet (a run that is there is taken as it is), evaluates all, writes results.json and
comparison.png beside this file, prints the README's table.
"""

import argparse
import json
import pathlib
import subprocess
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import vlm_jax
from vlm_jax import evaluators

HERE = pathlib.Path(__file__).parent
MODELS = {"CLIP": "clip", "Cap": "cap", "CapPa": "cappa", "UL2-Cap": "ul2_cap"}
STYLE = dict(uri="tfds:emoji", split="unseen_style")
CONTENT = "crop_to_content | resize(32)"
EVALS = {
    "captions": dict(type="captions", captions="name/en", label="concept", classes="emoji:seen", gallery=0, **STYLE),
    "probe": dict(type="probe", label="concept", classes="emoji:seen", l2=1.0, **STYLE),
    "few_shot": dict(type="probe", label="concept", classes="emoji:seen", shots=1, l2=1.0, **STYLE),
    "foils": dict(type="foils", **STYLE),
    # the same on pictures of one even colour: what the words alone tell
    "blind_foils": dict(type="foils", ops=f"{CONTENT} | resize(1) | resize(32) | normalize", **STYLE),
}
ROWS = {  # name: (evaluation, metric)
    "names among 732, unseen style": ("unseen_style", "top1"),
    "names among 129, unseen concepts": ("unseen_concepts", "top1"),
    "writes the exact name": ("captions", "exact_match"),
    "linear probe": ("probe", "top1"),
    "one-shot probe": ("few_shot", "top1"),
    "foils: object": ("foils", "object"),
    "foils: attribute": ("foils", "attribute"),
    "foils: order": ("foils", "order"),
    "foils without the picture: object": ("blind_foils", "object"),
    "foils without the picture: attribute": ("blind_foils", "attribute"),
    "foils without the picture: order": ("blind_foils", "order"),
}


def measure(name, seed, runs):
    """{evaluation: metrics} of one run."""
    workdir = runs / f"{MODELS[name]}_{seed}"
    if not (workdir / "results.json").exists():
        config = ["--config", f"configs/{MODELS[name]}.py:tiny", f"--config.seed={seed}"]
        subprocess.run([sys.executable, "-m", "vlm_jax.train", *config, f"--workdir={workdir}"], check=True)
    trained = json.loads((workdir / "results.json").read_text())
    found = {}
    for key, value in trained.items():
        evaluation, _, metric = key.rpartition("/")
        found.setdefault(evaluation, {})[metric] = value
    pretrained = vlm_jax.load(workdir)
    for evaluation, section in EVALS.items():
        if evaluation != "captions" or pretrained.is_captioner:
            found[evaluation] = evaluators.build(section)(pretrained).metrics
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/captioning"))
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
    """The table and comparison.png: means over seeds, and their range."""
    numbers = {
        row: {
            name: [of[evaluation][metric] for seed in seeds if evaluation in (of := results[f"{name} {seed}"])]
            for name in MODELS
        }
        for row, (evaluation, metric) in ROWS.items()
    }
    show = lambda values: f"{np.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})" if values else ""
    lines = [f"| | {' | '.join(MODELS)} |", "|---" * (len(MODELS) + 1) + "|"]
    lines += [f"| {row} | {' | '.join(show(values) for values in of.values())} |" for row, of in numbers.items()]
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    places = np.arange(len(ROWS))[::-1]
    for i, name in enumerate(MODELS):
        for place, of in zip(places, numbers.values(), strict=True):
            if of[name]:
                label = name if place == places[0] else None
                at = place + 0.2 * (1.5 - i)
                axes.barh(at, np.mean(of[name]), 0.18, color=f"C{i}", label=label)
                axes.plot(of[name], [at] * len(of[name]), "k.", markersize=3)
    axes.set_yticks(places, list(ROWS))
    axes.set_xlabel(f"share right; dots are seeds {', '.join(map(str, seeds))}")
    axes.axvline(0.5, color="0.7", linewidth=0.8, zorder=0)
    axes.set_xlim(0, 1)
    axes.legend()
    figure.savefig(HERE / "comparison.png", dpi=150)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
