"""Trains and evaluates CLIP, Cap, CapPa and UL2-Cap. See README.md here."""

import argparse
import json
import pathlib
import subprocess
import sys

import numpy as np

import vlm_jax
from experiments import study
from vlm_jax import evaluators

SEEDS = (0, 1, 2)
MODELS = {"CLIP": "clip", "Cap": "cap", "CapPa": "cappa", "UL2-Cap": "ul2_cap"}
STYLE = dict(uri="tfds:emoji", split="unseen_style")
CONTENT = "crop_to_content | resize(32)"
EVALS = {
    "captions": dict(type="captions", captions="name/en", label="concept", classes="emoji:seen", gallery=0, **STYLE),
    "probe": dict(type="probe", label="concept", classes="emoji:seen", l2=1.0, **STYLE),
    "few_shot": dict(type="probe", label="concept", classes="emoji:seen", shots=1, l2=1.0, **STYLE),
    "foils": dict(type="foils", **STYLE),
    # the same on pictures of one even colour: measures the words alone
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
    """Returns {evaluation: metrics} of one run; trains the run if it has no results."""
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


def numbers(results):
    """{row: {model: values of the seeds}}; an empty list if a model lacks the evaluation."""
    return {
        row: {
            name: [of[evaluation][metric] for seed in SEEDS if evaluation in (of := results[f"{name} {seed}"])]
            for name in MODELS
        }
        for row, (evaluation, metric) in ROWS.items()
    }


def table(results):
    show = lambda values: f"{np.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})" if values else ""
    rows = [[row, *map(show, of.values())] for row, of in numbers(results).items()]
    return f"{study.markdown(['', *MODELS], rows)}\n\n{study.claims(verdicts(results))}"


def verdicts(results):
    def of(name, row):
        evaluation, metric = ROWS[row]
        return study.over(results, name, SEEDS, lambda found: found[evaluation][metric])

    def each(compare, rows, models, others):
        return [compare(of(model, row), of(other, row)) for row in rows for model in models for other in others]

    above, rivals, verdict = study.above, study.rivals, study.verdict
    published, clip = ("Cap", "CapPa"), ("CLIP",)
    names, probes = list(ROWS)[:2], ("linear probe", "one-shot probe")
    foils = {
        "foils: attribute": "foils without the picture: attribute",
        "foils: order": "foils without the picture: order",
    }
    return {
        "towers rival CLIP's under probes, likelihoods know the order of words": verdict(
            *each(rivals, probes, published, clip), *each(above, ["foils: order"], published, clip)
        ),
        "CapPa's tower above Cap's under probes": verdict(*each(above, probes, ["CapPa"], ["Cap"])),
        "CLIP names better than captioners": verdict(*each(above, names, clip, published)),
        "captioners know attributes and order better than CLIP": verdict(*each(above, foils, published, clip)),
        "the picture, not the words alone, tells captioners attributes and order": verdict(
            *(above(of(name, seen), of(name, blind)) for name in published for seen, blind in foils.items())
        ),
        "a mixture of denoisers names and writes better than CapPa": verdict(
            *each(above, (*names, "writes the exact name"), ["UL2-Cap"], ["CapPa"])
        ),
    }


def plot(results):
    figure, axes = study.subplots(size=(9, 6.5))
    places = np.arange(len(ROWS))[::-1]
    for i, name in enumerate(MODELS):
        for place, of in zip(places, numbers(results).values(), strict=True):
            if of[name]:
                label, at = name if place == places[0] else None, place + 0.2 * (1.5 - i)
                axes.barh(at, np.mean(of[name]), 0.2, color=study.SHADES[i], label=label, **study.BAR)
                axes.plot(of[name], [at] * len(of[name]), **study.DOT)
    axes.set_yticks(places, list(ROWS))
    axes.set_xlabel(f"share right, mean of seeds {', '.join(map(str, SEEDS))}, which are the dots")
    axes.axvline(0.5, color=study.INK, linestyle=":", linewidth=1, zorder=0)
    axes.set_xlim(0, 1)
    axes.legend(loc="upper right")
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/captioning"))
    runs = parser.parse_args().runs
    study.fill("captioning_vs_contrastive", MODELS, SEEDS, lambda model, seed: measure(model, seed, runs))
    study.publish("captioning_vs_contrastive", table, plot, verdicts)


if __name__ == "__main__":
    main()
