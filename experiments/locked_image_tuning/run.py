"""Trains pairs of towers, locked, pretrained or from scratch, and ridge regression. See README.md here."""

import argparse
import pathlib

import numpy as np

import vlm_jax
from configs import lit
from experiments import study
from vlm_jax import config
from vlm_jax.data import emoji
from vlm_jax.data.sources import open_source
from vlm_jax.precompute import precompute
from vlm_jax.train import train

TESTS = {"unseen style": ("unseen_style", False), "unseen concepts": ("unseen_concepts", True)}
CHANCES = "unseen style, of 732", "unseen concepts, of 129"
SMALL = dict(px=64, duration="6k examples")
RUNS = {  # name: (letters, side of EfficientNet's pictures, examples, seeds)
    "Lu, 224 px": ("Lu", dict(px=224), (0, 1, 2)),
    "LU, 224 px": ("LU", dict(px=224, duration="15k examples"), (0,)),
    **{letters: (letters, SMALL, (0,)) for letters in ("Lu", "LU", "uu", "uU", "Uu", "UU")},
}
CHOSEN_ON = "emojione"  # the style on which ridge's strength is chosen
STRENGTHS = (1.0, 10.0, 100.0, 1000.0, 10_000.0)


def settings_of(letters, px, runs, duration=None):
    settings = config.plain(lit.get_config(f"tiny-{letters}"))
    resized = lambda text: text.replace("resize(224)", f"resize({px})")
    settings["preprocess"], settings["data"]["ops"] = map(resized, (settings["preprocess"], settings["data"]["ops"]))
    if duration:
        settings["duration"] = duration
    if letters[0] == "L":
        settings["data"]["uri"] = f"precomputed:{embeddings(px, 'train', runs)}"
    return settings


def embeddings(px, split, runs):
    """Embeds a split by the locked tower and returns the folder."""
    out = runs / f"images_{px}_{split}"
    settings = config.plain(lit.get_config("tiny-LU"))
    settings["preprocess"] = settings["preprocess"].replace("resize(224)", f"resize({px})")
    precompute(settings, out, uri="tfds:emoji", split=split)
    return out


def ridge(px, runs):
    """{test: top-1} of ridge regression from the locked image embeddings to the untuned text embeddings of names."""
    text = vlm_jax.load(lit.TEXT, tokenize="tokenize(16)")

    def read(split):
        source = open_source(f"precomputed:{embeddings(px, split, runs)}")
        records = [source[i] for i in range(len(source))]
        column = lambda name: np.array([record[name] for record in records])
        return column("image").astype(np.float64), column("concept"), column("style"), records

    x, concept, style, records = read("train")
    names = {record["concept"]: record["name"]["en"] for record in records}
    targets = dict(zip(names, text.embed_texts(list(names.values())).astype(np.float64), strict=True))
    y = np.stack([targets[c] for c in concept])
    candidates_of = {held_out: emoji.concepts(held_out=held_out) for held_out in (False, True)}
    embedded = {held_out: text.embed_texts(list(names.values())) for held_out, names in candidates_of.items()}

    def top1(rows, l2, pictures, truth, held_out):
        mean, scale = x[rows].mean(0), x[rows].std(0) + 1e-6
        z, target = (x[rows] - mean) / scale, y[rows].mean(0)
        weights = np.linalg.solve(z.T @ z + l2 * np.eye(z.shape[1]), z.T @ (y[rows] - target))
        predicted = (pictures - mean) / scale @ weights + target
        labels = np.array(list(candidates_of[held_out]))
        among = np.isin(truth, labels)
        found = labels[np.argmax(predicted[among] @ embedded[held_out].T, axis=1)]
        return float(np.mean(found == truth[among]))

    held = style == CHOSEN_ON
    chosen = max(STRENGTHS, key=lambda l2: top1(~held, l2, x[held], concept[held], False))
    found = {"l2": chosen}
    for test, (split, held_out) in TESTS.items():
        pictures, truth, _, _ = read(split)
        found[test] = top1(np.ones(len(x), bool), chosen, pictures, truth, held_out)
    return found


def table(results):
    show = lambda values: (
        f"{100 * np.mean(values):.1f}"
        + (f" ({100 * min(values):.1f}-{100 * max(values):.1f})" if len(values) > 1 else "")
    )
    rows = {"ridge, 224 px": [show([results["ridge"][test]]) for test in TESTS]}
    for name, (_, _, seeds) in RUNS.items():
        rows[name] = [show([results[f"{name} {seed}"][test] for seed in seeds]) for test in TESTS]
    small = [name for name, (_, sizes, _) in RUNS.items() if sizes is SMALL]
    seconds = lambda name: f"{results[f'{name} 0']['seconds']:.0f}"
    large = study.markdown(["", *CHANCES], [[name, *cells] for name, cells in rows.items() if name not in small])
    head = "64 px, 6,000 examples", *TESTS, "seconds of training"
    pairs = study.markdown(head, [[name, *rows[name], seconds(name)] for name in small])
    return "\n\n".join((large, pairs, study.claims(verdicts(results))))


def verdicts(results):
    """Verdicts on pairs of towers, on the unseen style, by the runs with equal numbers of examples (64 px)."""
    Lu, LU, LL, Uu, uu = (
        study.over(results, letters, (0,), lambda found: found["unseen style"])
        for letters in ("Lu", "LU", "LL", "Uu", "uu")
    )
    above, rivals, verdict = study.above, study.rivals, study.verdict
    return {
        "a locked image tower with a text tower from scratch beats unlocked and scratch": verdict(
            above(Lu, Uu), above(Lu, uu)
        ),
        "an unlocked pretrained image tower beats one from scratch": verdict(above(Uu, uu)),
        "beside a locked image tower a pretrained text tower helps little": verdict(rivals(Lu, LU)),
        "a text tower that is locked, too, is too stiff": verdict(above(Lu, LL), above(LU, LL)),
    }


def plot(results):
    figure, axes = study.subplots(1, 2, size=(9, 3.4), sharey=True)
    for ax, (text, what) in zip(axes, (("u", "text tower from scratch"), ("U", "text tower pretrained")), strict=True):
        letters = [f"{image}{text}" for image in "LUu"]
        for i, test in enumerate(TESTS):
            values = [100 * results[f"{name} 0"][test] for name in letters]
            bars = ax.bar(
                np.arange(3) + 0.4 * (i - 0.5), values, 0.38, label=test, color=study.SHADES[2 * i], **study.BAR
            )
            ax.bar_label(bars, fmt="%.1f", padding=2)
        ax.set_xticks(range(3), letters)
        ax.set_title(what)
    axes[0].set_ylabel("top-1, %, after 6,000 examples")
    axes[0].legend()
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/locked_image_tuning"))
    runs, results = parser.parse_args().runs.absolute(), study.read("locked_image_tuning", {})
    if "ridge" not in results:
        results["ridge"] = ridge(224, runs)
        study.save("locked_image_tuning", results)
    for name, (letters, sizes, seeds) in RUNS.items():
        for seed in seeds:
            if f"{name} {seed}" in results:
                continue
            workdir = runs / f"{letters}_{sizes['px']}_{seed}"
            trained = train(settings_of(letters, runs=runs, **sizes) | {"seed": seed}, workdir)
            numbers = {test: trained[f"{split}/top1"] for test, (split, _) in TESTS.items()}
            results[f"{name} {seed}"] = numbers | {"seconds": trained["train/seconds"]}
            study.save("locked_image_tuning", results)
    study.publish("locked_image_tuning", table, plot, verdicts)


if __name__ == "__main__":
    main()
