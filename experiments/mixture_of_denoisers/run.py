"""Trains and evaluates span corruption, prefixes and the mixture of both. See README.md here."""

import argparse
import pathlib

import numpy as np

import vlm_jax
from configs import ul2
from experiments import study
from vlm_jax import config, evaluators
from vlm_jax.train import train

SEEDS = (0, 1, 2)
ARCHITECTURES = ("encoder-decoder", "decoder")
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
    """Returns {task: perplexity} of one run on the texts of held-out concepts; trains the run if needed."""
    variant, denoisers = MODELS[name]
    settings = config.plain(ul2.get_config(variant, denoisers)) | {"seed": seed}
    workdir = runs / f"{variant}_{denoisers}_{seed}"
    if not (workdir / "results.json").exists():
        train(settings, workdir)
    pretrained = vlm_jax.load(workdir)
    found = {}
    for task, (mean_span, rate, mode) in TASKS.items():
        if denoisers != "ul2":
            mode = None  # this model has seen no mode tokens
        ops = settings["data"]["ops"].replace(
            f"denoisers='{denoisers}'", f"denoisers=((({mean_span}, {rate}, {mode!r}), 1),)"
        )
        section = dict(type="denoising", uri="tfds:emoji", split="unseen_concepts", ops=ops, denoisers=[task])
        found[task] = evaluators.build(section)(pretrained).metrics["perplexity"]
    return found


def numbers(results):
    """{model: {task: values of the seeds}}."""
    of = lambda name, task: [results[f"{name} {seed}"][task] for seed in SEEDS]
    return {name: {task: of(name, task) for task in TASKS} for name in MODELS}


def mean(values):
    return np.exp(np.mean(np.log(values)))


def table(results):
    digits = lambda value: f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
    show = lambda values: f"{digits(mean(values))} ({digits(min(values))}-{digits(max(values))})"
    rows = [[name, *map(show, of.values())] for name, of in numbers(results).items()]
    return f"{study.markdown(['perplexity', *TASKS], rows)}\n\n{study.claims(verdicts(results))}"


def verdicts(results):
    """Verdicts by log-likelihoods, on all tasks and with both architectures."""

    def of(kind, model, task):
        return study.over(results, f"{kind}, {model}", SEEDS, lambda found: -np.log(found[task]))

    cases = [
        (kind, task, *(("spans", "prefixes") if task.startswith("fill in") else ("prefixes", "spans")))
        for kind in ARCHITECTURES
        for task in TASKS
    ]
    return {
        "spans alone fill in better and prefixes alone continue better": study.verdict(
            *(study.above(of(kind, own, task), of(kind, other, task)) for kind, task, own, other in cases)
        ),
        "the mixture fills in as spans do and continues as prefixes do": study.verdict(
            *(study.rivals(of(kind, "mixture", task), of(kind, own, task)) for kind, task, own, _ in cases)
        ),
    }


def plot(results):
    figure, axes = study.subplots(1, len(TASKS), size=(12, 3), sharey=True)
    places = np.arange(len(MODELS))[::-1]
    for ax, task in zip(axes, TASKS, strict=True):
        for place, of in zip(places, numbers(results).values(), strict=True):
            ax.barh(place, mean(of[task]), color=study.SHADES[2 - place % 3], **study.BAR)
            ax.plot(of[task], [place] * len(SEEDS), **study.DOT)
        ax.set_title(task)
        ax.set_xscale("log")
        ax.set_xlim(10, 10**6)
        ax.set_xlabel("perplexity, dots are seeds")
    axes[0].set_yticks(places, list(MODELS))
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/denoisers"))
    runs = parser.parse_args().runs
    study.fill("mixture_of_denoisers", MODELS, SEEDS, lambda model, seed: measure(model, seed, runs))
    study.publish("mixture_of_denoisers", table, plot, verdicts)


if __name__ == "__main__":
    main()
