"""Evaluates the packaged models on both test beds, in splits that no training saw. See README.md here."""

import argparse
import re

from configs.prefix_lm import DENOISE
from experiments import study

ZOO = study.HERE.parent / "vlm_jax" / "zoo"
MODELS = ("clip_tiny", "clip_base", "lm_base")
NAMES = dict(uri="tfds:emoji", label="concept")
UNSEEN = dict(uri="scenes:?size=64&examples=1000", split="unseen_style")
PAIRS = dict(UNSEEN, split="unseen_pairs")
SEEN = dict(uri="scenes:?size=64&seed=1&examples=1000", split="train")  # combinations of training, other scenes
FOILS = dict(caption="caption", foils="foils")
BOTH_WAYS = ("image_to_text/recall@1", "text_to_image/recall@1")
TASKS = {  # what is asked -> evaluator, its arguments, its metrics
    "names, unseen style": ("zeroshot", dict(NAMES, split="unseen_style", classes="emoji:seen"), ("top1", "top5")),
    "names, unseen concepts": (
        "zeroshot",
        dict(NAMES, split="unseen_concepts", classes="emoji:held_out"),
        ("top1", "top5"),
    ),
    "linear probe of the group": ("probe", dict(uri="tfds:emoji", split="unseen_style", label="group"), ("top1",)),
    "the same in a training style": (
        "image_retrieval",
        dict(uri="tfds:emoji", split="unseen_style", gallery_split="train"),
        ("recall@1",),
    ),
    "captions": ("retrieval", UNSEEN, BOTH_WAYS),
    "long captions": ("retrieval", dict(UNSEEN, captions="long_caption"), BOTH_WAYS),
    "names in German": ("retrieval", dict(UNSEEN, captions="names/de", join=", "), BOTH_WAYS),
    "foils": ("foils", dict(UNSEEN, **FOILS), ("object", "attribute", "relation", "count", "order")),
    "foils, seen pairs": ("foils", dict(SEEN, **FOILS), ("attribute", "relation")),
    "foils, unseen pairs": ("foils", dict(PAIRS, **FOILS), ("attribute", "relation")),
    "minimal pairs": ("minimal_pairs", UNSEEN, ("text", "image", "group")),
    "changed pictures": ("composed_retrieval", UNSEEN, ("recall@1", "recall@10")),
    "questions": ("questions", UNSEEN, ("exact_match", "chance")),
    "counting": ("counting", UNSEEN, ("accuracy", "chance")),
    "regions": ("regions", UNSEEN, ("pointing", "chance", "mean_iou")),
    "continued captions": (
        "denoising",
        dict(
            UNSEEN,
            ops=f"caption('long_caption') | {DENOISE} | keep('input_ids', 'token_ids', 'denoiser')",
            denoisers=("half", "whole"),
        ),
        ("half/perplexity", "whole/perplexity"),
    ),
}
TEXTS = """Data: names and keywords of the packaged emoji (`tfds:emoji`) in nine languages; captions and questions of
`scenes:` in English. Never seen: the concepts of `unseen_concepts`, the combinations of `unseen_pairs`."""
DATA = """Data: packaged emoji (`tfds:emoji`, names and keywords in English) and `scenes:` of 64 px composed of them,
both in the five training styles. Never seen: the styles of `unseen_style`, the concepts of `unseen_concepts`, the
combinations of `unseen_pairs`. Licences of the pictures: `vlm_jax/data/emoji/NOTICE`."""
TRAINING = {  # of the models whose folder holds a card
    "clip_base": f"""    vlm-jax train --config=clip:base --workdir=runs/clip_base
    vlm-jax convert runs/clip_base vlm_jax/zoo/clip_base --dtype=bfloat16

{DATA}""",
    "lm_base": f"""    vlm-jax train --config=prefix_lm:base --workdir=runs/lm_base
    vlm-jax convert runs/lm_base vlm_jax/zoo/lm_base --dtype=bfloat16

{TEXTS}""",
}
DRAWN = ("names, unseen style", "names, unseen concepts", "captions", "foils", "minimal pairs", "questions", "regions")


def measure(model):
    """Returns {task: the evaluator's results, or {"refused": reason}} of a packaged model."""
    import vlm_jax
    from vlm_jax.errors import UserError
    from vlm_jax.evaluate import evaluate

    loaded, found = vlm_jax.load(f"pkg:vlm_jax/zoo/{model}"), {}
    for name, (task, section, _) in TASKS.items():
        try:
            found[name] = evaluate(loaded, task, **section)
        except UserError as refused:
            found[name] = {"refused": str(refused)}
    return found


def value(results, model, task, metric):
    """Returns a number; None where the model cannot do the task."""
    return results[model][task].get(f"{TASKS[task][0]}/{metric}")


def table(results, models=MODELS):
    rows = []
    for task, (_, _, metrics) in TASKS.items():
        for metric in metrics:
            numbers = [value(results, model, task, metric) for model in models]
            rows.append([task, metric.replace("_", " "), *("" if one is None else f"{one:.3f}" for one in numbers)])
    return study.markdown(["task", "metric", *(f"`{model}`" for model in models)], rows)


def plot(results):
    figure, ax = study.subplots(size=(6, 3.2))
    height = 0.8 / len(MODELS)
    for i, model in enumerate(MODELS):
        numbers = [value(results, model, task, TASKS[task][2][0]) or 0.0 for task in DRAWN]
        places = [place + (i - (len(MODELS) - 1) / 2) * height for place in range(len(DRAWN))]
        ax.barh(places, numbers, height, color=study.SHADES[len(MODELS) - 1 - i], label=model, **study.BAR)
    ax.set_yticks(range(len(DRAWN)), [f"{task}: {TASKS[task][2][0].replace('_', ' ')}" for task in DRAWN])
    ax.invert_yaxis()
    ax.set_xlim(0, 1)
    ax.set_xlabel("share of the examples")
    figure.legend(loc="outside upper right", ncols=len(MODELS))
    return figure


def write_card(results, model):
    """Adds training and results to the model card in the folder of a packaged model."""
    path = ZOO / model / "README.md"
    head = re.split(r"\n(?:Training data, results: not stated\.|## Training)", path.read_text())[0]
    shown = f"Splits, tasks, other models: `experiments/base_models`.\n\n{table(results, [model])}"
    path.write_text(f"{head.rstrip()}\n\n## Training\n\n{TRAINING[model]}\n\n## Results\n\n{shown}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="models to measure again")
    options = parser.parse_args()
    results = study.read("base_models", {})
    for model in MODELS:
        if model in options.models or model not in results:
            results[model] = measure(model)
            study.save("base_models", results)
    study.publish("base_models", table, plot)
    for model in TRAINING:
        write_card(results, model)


if __name__ == "__main__":
    main()
