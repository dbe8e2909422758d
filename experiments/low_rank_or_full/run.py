"""Counts the directions that low-rank and full tuning bring into the matrices of a model. See README.md here."""

import numpy as np

import vlm_jax
from experiments import study
from vlm_jax.adapt.methods import fit
from vlm_jax.adapt.task import Shots, Task, accuracy
from vlm_jax.data import ops
from vlm_jax.data.class_lists import read
from vlm_jax.data.sources import open_source
from vlm_jax.evaluators.analyses.spectra import changes
from vlm_jax.pretrained import class_embeddings
from vlm_jax.zoo.adapters import merged

MODEL = "pkg:vlm_jax/zoo/clip_tiny"
RANKS, SEEDS = (1, 4, 16, 64), range(3)
METHODS = (*(f"rank {rank}" for rank in RANKS), "full")
SHOTS, STEPS = 16, 200
THRESHOLDS = (0.4, 0.6, 0.8)


def pictures(model, split, places=None):
    """Preprocessed pictures of the 49 kinds, their embeddings and labels."""
    source, kinds = open_source("tfds:emoji", split), list(read("emoji:subgroups").values())
    prepare, rng = ops.parse(f"{model.preprocess} | keep('image')"), np.random.default_rng(0)
    records = [source[i] for i in (range(len(source)) if places is None else places)]
    records = [record for record in records if record["subgroup"] in kinds]
    images = np.stack([prepare({"image": record["image"]}, rng)["image"] for record in records])
    return Shots(images, model.embed_image_batch(images), np.array([kinds.index(r["subgroup"]) for r in records]))


def drawn(labels, shots, seed):
    """Places of `shots` pictures of each kind, and of four others."""
    order = np.random.default_rng(seed).permutation(len(labels))
    of = [order[labels[order] == kind] for kind in np.unique(labels)]
    return np.concatenate([one[:shots] for one in of]), np.concatenate([one[shots : shots + 4] for one in of])


def measure(method, seed):
    """Returns top-1 on the unseen style, and how the queries' and values' matrices of the attention changed."""
    model, names = vlm_jax.load(MODEL), list(read("emoji:subgroups").values())
    source = open_source("tfds:emoji", "train")
    kinds = [source[i]["subgroup"] for i in range(len(source))]
    known = np.array([names.index(kind) if kind in names else -1 for kind in kinds])
    train, validation = drawn(np.where(known >= 0, known, known.max() + 1), SHOTS, seed)
    scale = float(np.exp(model.params["logit_scale"]))
    task = Task(names, ["{}"], class_embeddings(model.embed_texts, names, ["{}"]), scale, seed)
    shots, others = (pictures(model, "train", places) for places in (train, validation))
    options = {} if method == "full" else dict(rank=int(method.split()[1]))
    name = "full" if method == "full" else "lora"
    tuned = merged(fit(name)(model, shots, others, task, steps=STEPS, **options))
    top1 = accuracy(model, tuned, pictures(model, "unseen_style"), names)
    found = changes(model.params, tuned.params)
    kept = {key: one for key, one in found.items() if "/attn/query" in key or "/attn/value" in key}
    print(method, seed, top1, sum(one.intruders for one in kept.values()), flush=True)
    return dict(
        top1=top1,
        cosines={key: one.cosines.tolist() for key, one in kept.items()},
        distance=float(np.mean([one.distance for one in kept.values()])),
        rank=float(np.mean([one.rank for one in kept.values()])),
    )


def intruders(threshold=0.6):
    """Intruders of a matrix among its ten highest directions, the mean over matrices."""
    return lambda own: float(np.mean([np.sum(np.array(one) < threshold) for one in own["cosines"].values()]))


def verdicts(results):
    of = lambda method: study.over(results, method, SEEDS, intruders())
    return {
        "low rank brings intruders, full tuning hardly any": study.verdict(study.above(of("rank 1"), of("full"))),
        "a higher rank brings fewer": study.verdict(study.above(of("rank 1"), of("rank 64"))),
    }


def table(results):
    show = lambda n, factor=1.0, digits=2: f"{factor * n.mean:.{digits}f} ± {factor * n.spread:.{digits}f}"
    rows = []
    for method in METHODS:
        number = lambda value, method=method: study.over(results, method, SEEDS, value)
        counts = [show(number(intruders(threshold))) for threshold in THRESHOLDS]
        of = [show(number(lambda own, key=key: own[key])) for key in ("distance", "rank")]
        rows.append([method, show(number(lambda own: own["top1"]), 100, 1), *counts, *of])
    heads = [f"intruders below {threshold}" for threshold in THRESHOLDS]
    head = ["tuning", "top-1, %", *heads, "distance", "effective rank of the change"]
    return "\n\n".join((study.markdown(head, rows), study.claims(verdicts(results))))


def plot(results):
    figure, ax = study.subplots(size=(5, 3))
    numbers = [study.over(results, method, SEEDS, intruders()) for method in METHODS]
    ax.bar(METHODS, [n.mean for n in numbers], color=study.SHADES[1], yerr=[n.spread for n in numbers],
           capsize=3, error_kw=dict(ecolor=study.INK), **study.BAR)  # fmt: skip
    ax.set_ylabel("intruders of a matrix\namong its ten highest directions")
    return figure


def main():
    study.fill("low_rank_or_full", METHODS, SEEDS, measure)
    study.publish("low_rank_or_full", table, plot, verdicts)


if __name__ == "__main__":
    main()
