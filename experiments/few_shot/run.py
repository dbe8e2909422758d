"""Adapts the demo's model to a few pictures in every way that there is. See README.md here."""

import argparse
import math
import pathlib
import subprocess
import sys

import numpy as np

import vlm_jax
from experiments import study
from vlm_jax import evaluators
from vlm_jax.adapt import heads
from vlm_jax.adapt.methods import HEADS, METHODS
from vlm_jax.data import emoji
from vlm_jax.data.sources import open_source

SHOTS = (2, 4, 8, 16)  # of one shot Gaussians have no covariance
KINDS = dict(uri="tfds:emoji", split="unseen_style", label="subgroup", classes="emoji:subgroups", seeds=3)
ELSEWHERE = {"near style": dict(split="near_style"), "unseen concepts": dict(split="unseen_concepts")}
NAMES = {"unseen style": "unseen style, of 732", "unseen concepts": "unseen concepts, of 129"}
OPTIONS = {"cocoop": dict(batch_size=8, learning_rate=1e-2)}  # 49 texts for each picture: the rest would take an hour
NEW = ("zero_shot", "prolip", "lora", "adapter", "coop", "cocoop", "vpt_deep", "maple", "upt", "full")
PROTOCOLS = {
    "16 shots": (tuple(METHODS), KINDS | dict(shots=16, tests=ELSEWHERE)),
    "base to new": (NEW, KINDS | dict(shots=16, base_to_new=True)),
} | {f"{shots} shots": (tuple(HEADS), KINDS | dict(shots=shots)) for shots in SHOTS[:-1]}


def retrieval_fusion(pretrained):
    """Names among 732 and among 129, by class names and by RECO's refined pictures and names; three seeds."""

    def embedded(split, held_out):
        source, names = open_source("tfds:emoji", split), emoji.concepts(held_out=held_out)
        records = [source[i] for i in range(len(source))]
        records = [record for record in records if record["concept"] in names]
        labels = np.array([record["concept"] for record in records])
        return pretrained.embed_images([record["image"] for record in records]), labels, names

    features, labels, names = embedded("train", False)
    texts = pretrained.embed_texts(list(names.values()))
    row = {concept: i for i, concept in enumerate(names)}
    pairs = texts[[row[label] for label in labels]]
    scale = math.exp(float(pretrained.params["logit_scale"]))
    train = lambda seed: heads.reco(features, pairs, scale, targets=labels, steps=300, batch_size=256, seed=seed)
    fused = [train(seed) for seed in range(3)]
    found = {}
    for test in ("unseen style", "unseen concepts"):
        pictures, truth, names = embedded(test.replace(" ", "_"), held_out=test == "unseen concepts")
        texts, known = pretrained.embed_texts(list(names.values())), np.array(list(names))
        right = lambda x, t, known=known, truth=truth: float(np.mean(known[np.argmax(x @ t.T, axis=1)] == truth))
        found[f"zero_shot/{test}"] = [right(pictures, texts)]
        found[f"reco/{test}"] = [right(head.images(pictures), head.texts(texts)) for head in fused]
    return found


def table(results):
    def cell(protocol, method, name):
        own = results.get(f"{protocol} {method}", {})
        spread = name.replace("top1", "spread").replace("harmonic_mean", "harmonic_spread")
        return f"{100 * own[name]:.1f} ± {100 * own[spread]:.1f}" if name in own else ""

    def block(protocol, methods, columns, title):
        rows = [[method, *(cell(protocol, method, name) for name in columns.values())] for method in methods]
        return study.markdown([title, *columns], rows)

    tests = {"unseen style": "top1"} | {name: f"{name}/top1" for name in ELSEWHERE}
    show = lambda values: (
        f"{100 * np.mean(values):.1f}" + (f" ± {100 * np.std(values, ddof=1):.1f}" if values[1:] else "")
    )
    fusion = {"zero_shot": "class names", "reco": "RECO"}
    names = [
        [row, *(show(results["retrieval fusion"][f"{key}/{test}"]) for test in NAMES)] for key, row in fusion.items()
    ]
    return "\n\n".join((
        block("16 shots", METHODS, tests, "top-1, %, 16 shots"),
        block("base to new", NEW, {"base": "top1", "new": "new/top1", "harmonic mean": "harmonic_mean"}, "top-1, %"),
        study.markdown(["top-1, %, by", *NAMES.values()], names),
    ))  # fmt: skip


def plot(results):
    figure, (left, right) = study.subplots(1, 2, size=(12, 4.8), width_ratios=(1, 1.2))
    for i, (method, marker) in enumerate(zip(HEADS, "ovs^Dx*", strict=True)):
        at = [results[f"{shots} shots {method}"] for shots in SHOTS]
        top1, spread = ([100 * own[name] for own in at] for name in ("top1", "spread"))
        face = dict(markerfacecolor="white") if i % 2 else {}
        line = dict(
            color=study.INK if i % 2 else study.SHADES[0], linestyle=("-", "--", ":", "-.")[i % 4], linewidth=1.2
        )
        left.plot(SHOTS, top1, marker=marker, label=method, **line, **face)
        left.errorbar(SHOTS, top1, spread, color=study.GREY, linestyle="", linewidth=1, capsize=2, zorder=1)
    left.set_xscale("log", base=2)
    left.set_xticks(SHOTS, SHOTS)
    left.set_xlabel("pictures of each class")
    left.set_ylabel("top-1 among 49, unseen style, %")
    left.legend()
    order = sorted(METHODS, key=lambda method: results[f"16 shots {method}"]["top1"])
    own = [results[f"16 shots {method}"] for method in order]
    colors = [study.SHADES[2 if method in HEADS else 0] for method in order]
    spread = dict(xerr=[100 * n["spread"] for n in own], capsize=2, error_kw=dict(ecolor=study.INK))
    right.barh(order, [100 * n["top1"] for n in own], color=colors, **spread, **study.BAR)
    right.set_xlabel("top-1 at 16 shots, %; light: heads on cached features")
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=pathlib.Path, default=pathlib.Path("runs/captioning/clip_0"))
    options = parser.parse_args()
    if not (options.model / "results.json").exists():
        config = ["--config=configs/clip.py:tiny", f"--workdir={options.model}"]
        subprocess.run([sys.executable, "-m", "vlm_jax.train", *config], check=True)
    pretrained = vlm_jax.load(options.model)
    results = study.read("few_shot", {})
    if "retrieval fusion" not in results:
        results["retrieval fusion"] = retrieval_fusion(pretrained)
        study.save("few_shot", results)
    for protocol, (methods, section) in PROTOCOLS.items():
        for group in (HEADS, *({method} for method in METHODS if method not in HEADS)):
            todo = [m for m in methods if m in group and f"{protocol} {m}" not in results]
            if not todo:
                continue
            given = dict(section, methods=todo, options=OPTIONS.get(todo[0]))
            numbers = evaluators.build(dict(type="few_shot", **given))(pretrained).metrics
            for method in todo:
                own = {name.partition("/")[2]: x for name, x in numbers.items() if name.startswith(f"{method}/")}
                results[f"{protocol} {method}"] = own
                print(protocol, method, own, flush=True)
            study.save("few_shot", results)
    study.publish("few_shot", table, plot)


if __name__ == "__main__":
    main()
