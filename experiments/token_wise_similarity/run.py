"""Compares CLIP and FILIP at equal cost: naming pictures, and pointing at words in collages. See README.md."""

import argparse
import json
from pathlib import Path

import numpy as np

import vlm_jax
from configs import clip, filip
from experiments import study
from vlm_jax import config
from vlm_jax.data import loader
from vlm_jax.evaluators import classes
from vlm_jax.pretrained import attention_maps
from vlm_jax.train import train

MODELS = {"CLIP": clip, "FILIP": filip}
SEEDS = (0, 1, 2)
MEASURES = {"names": "unseen style, top-1 of 732 names", "pointing": "words that point at their picture"}
COLLAGES = 500


def settings(name, seed):
    """The config of a run; configs differ only in pool and similarity."""
    settings = config.plain(MODELS[name].get_config("tiny"))
    if name == "CLIP":
        settings["model"]["image"]["pool"] = "gap"  # gives an embedding of each patch, as in FILIP
    zoomed = settings["data"]["ops"].replace("(10.0, 0.06, (0.82, 1.22))", "(10.0, 0.25, (0.4, 1.0))")
    assert zoomed != settings["data"]["ops"]
    settings["data"]["ops"] = zoomed
    evals = {"unseen_style": settings["evals"]["unseen_style"] | {"every": None}}
    return settings | dict(seed=seed, duration="100k examples", evals=evals)


def collages(count):
    """Collages of four unseen-style pictures of different concepts: uint8 [count, 64, 64, 3], names [count][4]."""
    names = classes.read("emoji:seen")
    ops = 'decode | crop_to_content | resize(32) | keep("image", "concept")'
    batches = loader.eval_batches(uri="tfds:emoji", split="unseen_style", ops=ops, batch_size=64)
    batches = [batches[i][0] for i in range(len(batches))]
    images, concepts = (np.concatenate([b[key][b["mask"]] for b in batches]) for key in ("image", "concept"))
    seen = np.flatnonzero(np.isin(concepts, list(names)))
    rng = np.random.default_rng(0)
    chosen = []
    while len(chosen) < count:
        four = rng.choice(seen, 4, replace=False)
        if len(set(concepts[four])) == 4:
            chosen.append(four)
    grids = images[np.array(chosen)].reshape(count, 2, 2, 32, 32, 3)
    pictures = grids.transpose(0, 1, 3, 2, 4, 5).reshape(count, 64, 64, 3)
    return pictures, [[names[int(concepts[i])] for i in four] for four in chosen]


def pointing(model, pictures, names, step=20):
    """The share of names whose best patch lies in their own quarter of the collage; chance is 1 / 4."""
    right = []
    for i in range(0, len(pictures), step):
        some = names[i : i + step]
        maps = attention_maps.word_patch(model, pictures[i : i + step], [name for four in some for name in four])
        n, _, height, width = maps.shape
        own = maps.reshape(n, n, 4, height, width)[np.arange(n), np.arange(n)]  # [n, 4, h, w]
        best = own.reshape(n, 4, -1).argmax(-1)
        quarter = 2 * (best // width >= height / 2) + (best % width >= width / 2)
        right.append(quarter == np.arange(4))
    return float(np.mean(np.concatenate(right)))


def measure(name, seed, runs):
    workdir = runs / f"{name}_{seed}"
    if not (workdir / "results.json").exists():
        train(settings(name, seed), workdir)
    named = json.loads((workdir / "results.json").read_text())["unseen_style/top1"]
    return {"names": named, "pointing": pointing(vlm_jax.load(workdir), *collages(COLLAGES))}


def numbers(results):
    """{model: {measure: percents of the seeds}}."""
    of = lambda name, what: [100 * results[f"{name} {seed}"][what] for seed in SEEDS]
    return {name: {what: of(name, what) for what in MEASURES} for name in MODELS}


def table(results):
    show = lambda values: f"{np.mean(values):.1f} ({min(values):.1f}-{max(values):.1f})"
    rows = [[name, *map(show, of.values())] for name, of in numbers(results).items()]
    measured = study.markdown(["%", *MEASURES.values()], rows)
    return f"{measured}\n\n{study.claims(verdicts(results))}"


def verdicts(results):
    of = lambda name, what: study.over(results, name, SEEDS, lambda found: found[what])
    return {
        "FILIP names better than CLIP, and its words find their patches": study.verdict(
            *(study.above(of("FILIP", what), of("CLIP", what)) for what in MEASURES)
        )
    }


def plot(results):
    figure, axes = study.subplots(1, len(MEASURES), size=(7, 2.4))
    for ax, (what, title) in zip(axes, MEASURES.items(), strict=True):
        for place, (name, of) in enumerate(numbers(results).items()):
            ax.bar(name, np.mean(of[what]), color=study.SHADES[2 * place], width=0.6, **study.BAR)
            ax.plot([place] * len(SEEDS), of[what], **study.DOT)
        ax.set_title(title)
        ax.set_ylabel("%, dots are seeds")
    axes[1].axhline(25, color=study.INK, linestyle="--", linewidth=0.8)
    axes[1].text(1.45, 26, "chance", ha="right")
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/token_wise"))
    runs = parser.parse_args().runs
    study.fill("token_wise_similarity", MODELS, SEEDS, lambda model, seed: measure(model, seed, runs))
    study.publish("token_wise_similarity", table, plot, verdicts)


if __name__ == "__main__":
    main()
