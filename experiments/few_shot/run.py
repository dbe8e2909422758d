"""Adapts the demo's model to a few pictures by every method of the catalogue. See README.md here."""

import argparse
import math
import pathlib
import subprocess
import sys

import numpy as np

import vlm_jax
from experiments import study
from vlm_jax import catalogue, evaluators
from vlm_jax.adapt import retrieval
from vlm_jax.data import emoji
from vlm_jax.data.sources import open_source
from vlm_jax.errors import UserError

SHOTS = (2, 4, 8, 16)  # not 1: Gaussians have no covariance then
KINDS = dict(uri="tfds:emoji", split="unseen_style", label="subgroup", classes="emoji:subgroups", seeds=3)
ELSEWHERE = {"near style": dict(split="near_style"), "unseen concepts": dict(split="unseen_concepts")}
NAMES = {"unseen style": "unseen style, of 732", "unseen concepts": "unseen concepts, of 129"}
OPTIONS = {"cocoop": dict(batch_size=8, learning_rate=1e-2)}  # 49 texts for each picture: the defaults take an hour
MARKERS, LINES = "ovs^Dx*", ("-", "--", ":", "-.")  # head i has those at i, modulo their number: 28 pairs


def heads():
    """Methods on cached features, in the catalogue's order."""
    return list(catalogue.of("heads"))


def methods():
    """All methods that adapt a model and need no option, in the catalogue's order."""
    families = [name for name, family in catalogue.FAMILIES.items() if family.kind == "adaptation"]
    return [name for name, method in catalogue.of(*families).items() if "" not in method.options.values()]


def protocols():
    """{protocol: (methods, section of the evaluator)}."""
    open_ended = ["zero_shot", *(method for method in methods() if method not in heads())]  # heads know no new classes
    return {
        "16 shots": (methods(), KINDS | dict(shots=16, tests=ELSEWHERE)),
        "base to new": (open_ended, KINDS | dict(shots=16, base_to_new=True)),
    } | {f"{shots} shots": (heads(), KINDS | dict(shots=shots)) for shots in SHOTS[:-1]}


def retrieval_fusion(pretrained):
    """Accuracies among 732 and 129 names, by class names and by RECO's refined pictures and names; three seeds."""

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
    train = lambda seed: retrieval.reco(features, pairs, scale, targets=labels, steps=300, batch_size=256, seed=seed)
    fused = [train(seed) for seed in range(3)]
    found = {}
    for test in ("unseen style", "unseen concepts"):
        pictures, truth, names = embedded(test.replace(" ", "_"), held_out=test == "unseen concepts")
        texts, known = pretrained.embed_texts(list(names.values())), np.array(list(names))
        right = lambda x, t, known=known, truth=truth: float(np.mean(known[np.argmax(x @ t.T, axis=1)] == truth))
        found[f"zero_shot/{test}"] = [right(pictures, texts)]
        found[f"reco/{test}"] = [right(head.images(pictures), head.texts(texts)) for head in fused]
    return found


def number(results, protocol, method, name="top1"):
    """The mean and the spread of a metric; None if the method has none."""
    own = results.get(f"{protocol} {method}", {})
    spread = name.replace("top1", "spread").replace("harmonic_mean", "harmonic_spread")
    return study.Number(own[name], own.get(spread, 0.0)) if name in own else None


def table(results):
    show = lambda n: f"{100 * n.mean:.1f} ± {100 * n.spread:.1f}" if n else ""

    def block(protocol, columns, title):
        shown = [method for method in methods() if f"{protocol} {method}" in results]
        cells = lambda method: (show(number(results, protocol, method, name)) for name in columns.values())
        return study.markdown([title, *columns], [[method, *cells(method)] for method in shown])

    tests = {"unseen style": "top1"} | {name: f"{name}/top1" for name in ELSEWHERE}
    found = {name: study.number(values) for name, values in results["retrieval fusion"].items()}
    names = [
        ["class names", *(f"{100 * found[f'zero_shot/{test}'].mean:.1f}" for test in NAMES)],
        ["RECO", *(show(found[f"reco/{test}"]) for test in NAMES)],
    ]
    return "\n\n".join((
        block("16 shots", tests, "top-1, %, 16 shots"),
        block("base to new", {"base": "top1", "new": "new/top1", "harmonic mean": "harmonic_mean"}, "top-1, %"),
        study.markdown(["top-1, %, by", *NAMES.values()], names),
        study.claims(verdicts(results)),
    ))  # fmt: skip


def verdicts(results):
    """Verdicts by top-1 on the unseen style at 16 shots; for base to new by top-1 of both halves or harmonic mean."""
    above, rivals, verdict = study.above, study.rivals, study.verdict
    shots = lambda method: number(results, "16 shots", method)
    halves = lambda method, name: number(results, "base to new", method, name)
    better = lambda method, *others: [above(shots(method), shots(other)) for other in others]
    mean = lambda method: above(halves(method, "harmonic_mean"), halves("coop", "harmonic_mean"))
    found = {by: study.number(values) for by, values in results.get("retrieval fusion", {}).items()}
    reco = lambda test: above(found.get(f"reco/{test}"), found.get(f"zero_shot/{test}"))
    zero, full = shots("zero_shot"), shots("full")
    most = study.Number(zero.mean + 0.9 * (full.mean - zero.mean), full.spread) if zero and full else None
    return {
        "a trained cache above an untrained one and a linear probe": verdict(
            *better("tip_adapter_f", "tip_adapter", "linear_probe")
        ),
        "TIP-X above Tip-Adapter": verdict(*better("tip_x", "tip_adapter")),
        "GDA above zero-shot and a linear probe": verdict(*better("gda", "zero_shot", "linear_probe")),
        "a cross-modal probe above a probe of pictures and zero-shot": verdict(
            *better("cross_modal_probe", "linear_probe", "zero_shot")
        ),
        "ProLIP above zero-shot": verdict(*better("prolip", "zero_shot")),
        "biases alone match tuning everything": verdict(rivals(shots("bias"), full)),
        "norms alone match tuning everything": verdict(rivals(shots("norm"), full)),
        "the last block alone reaches 90 % of what tuning everything gains": verdict(rivals(shots("last_1"), most)),
        "LoRA above zero-shot": verdict(*better("lora", "zero_shot")),
        "adapters above zero-shot": verdict(*better("adapter", "zero_shot"), *better("adaptformer", "zero_shot")),
        "prefixes above zero-shot": verdict(*better("prefix", "zero_shot")),
        "contexts gain on the classes they see and lose on new ones": verdict(
            above(halves("coop", "top1"), halves("zero_shot", "top1")),
            above(halves("zero_shot", "new/top1"), halves("coop", "new/top1")),
        ),
        "CoCoOp's harmonic mean above CoOp's": verdict(mean("cocoop")),
        "MaPLe's harmonic mean above CoOp's": verdict(mean("maple")),
        "UPT's harmonic mean above CoOp's": verdict(mean("upt")),
        "prompts in the image tower rival tuning all of it": verdict(
            rivals(shots("vpt"), full), rivals(shots("vpt_deep"), full)
        ),
        "retrieved pairs make pictures easier to name": verdict(*map(reco, NAMES)),
    }


def plot(results):
    order = [method for method in methods() if f"16 shots {method}" in results]
    figure, (left, right) = study.subplots(1, 2, size=(12, max(4.8, 0.21 * len(order))), width_ratios=(1, 1.2))
    shown = [method for method in heads() if all(f"{shots} shots {method}" in results for shots in SHOTS)]
    for i, method in enumerate(shown):
        at = [number(results, f"{shots} shots", method) for shots in SHOTS]
        top1, spread = ([100 * value for value in values] for values in zip(*at, strict=True))
        face = dict(markerfacecolor="white") if i % 2 else {}
        line = dict(color=study.INK if i % 2 else study.SHADES[0], linestyle=LINES[i % len(LINES)], linewidth=1.2)
        left.plot(SHOTS, top1, marker=MARKERS[i % len(MARKERS)], label=method, **line, **face)
        left.errorbar(SHOTS, top1, spread, color=study.GREY, linestyle="", linewidth=1, capsize=2, zorder=1)
    left.set_xscale("log", base=2)
    left.set_xticks(SHOTS, SHOTS)
    left.set_xlabel("pictures of each class")
    left.set_ylabel("top-1 among 49, unseen style, %")
    left.legend(ncols=-(-len(shown) // 10) or 1)
    order.sort(key=lambda method: results[f"16 shots {method}"]["top1"])
    own = [number(results, "16 shots", method) for method in order]
    colors = [study.SHADES[2 if method in heads() else 0] for method in order]
    spread = dict(xerr=[100 * n.spread for n in own], capsize=2, error_kw=dict(ecolor=study.INK))
    right.barh(order, [100 * n.mean for n in own], color=colors, **spread, **study.BAR)
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
    for protocol, (asked, section) in protocols().items():
        for group in (heads(), *([method] for method in methods() if method not in heads())):
            todo = [method for method in group if method in asked and f"{protocol} {method}" not in results]
            if not todo:
                continue
            evaluate = evaluators.build(dict(section, type="few_shot", methods=todo, options=OPTIONS.get(todo[0])))
            try:
                numbers = evaluate(pretrained).metrics
            except UserError as error:  # for instance cross_attention, on a model without cross-attention
                if group == heads():
                    raise
                print(f"{protocol} {todo[0]} is left out: {error}", flush=True)
                continue
            for method in todo:
                own = {name.partition("/")[2]: x for name, x in numbers.items() if name.startswith(f"{method}/")}
                results[f"{protocol} {method}"] = own
                print(protocol, method, own, flush=True)
            study.save("few_shot", results)
    study.publish("few_shot", table, plot, verdicts)


if __name__ == "__main__":
    main()
