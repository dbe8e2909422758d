"""Asks the packaged models how sure they are, what they do not know, and what corruptions cost. See README.md here."""

import vlm_jax
from experiments import study
from vlm_jax.data.ops.corruptions import CORRUPTIONS
from vlm_jax.evaluate import evaluate

MODELS = ("clip_tiny", "clip_base")
SEVERITIES = (1, 3, 5)
NAMES = dict(uri="tfds:emoji", split="unseen_style", classes="emoji:seen", label="concept")
SCORES = ("msp", "energy", "max_logit", "mcm", "mahalanobis")


def measure(model):
    """Returns the results of a packaged model: calibration, unknown concepts, top-1 of each corruption and severity."""
    loaded = vlm_jax.load(f"pkg:vlm_jax/zoo/{model}")
    *ops, last = loaded.preprocess.split(" | ")
    found = {
        "calibration": evaluate(loaded, "calibration", **NAMES),
        "unknown": evaluate(
            loaded, "out_of_distribution", **NAMES, other_split="unseen_concepts",
            other_where=dict(style=["noto"]), train_split="train",
        ),
        "clean": evaluate(loaded, "zeroshot", **NAMES, gallery=0)["zeroshot/top1"],
    }  # fmt: skip
    for kind in CORRUPTIONS:
        for severity in SEVERITIES:
            changed = " | ".join([*ops[1:], f"corrupt('{kind}', {severity})", last])
            top1 = evaluate(loaded, "zeroshot", **NAMES, gallery=0, ops=changed)["zeroshot/top1"]
            found[f"{kind} {severity}"] = top1
            print(model, kind, severity, top1, flush=True)
    return found


def error(results, model, prefix=""):
    """The expected calibration error of a model, as a number without spread; None if it was not measured."""
    own = results.get(model)
    return own and study.Number(own["calibration"][f"calibration/{prefix}error"])


def auroc(results, model, score):
    own = results.get(model)
    return own and study.Number(own["unknown"][f"out_of_distribution/{score}/auroc"])


def verdicts(results):
    lower = [study.above(error(results, model), error(results, model, "scaled/")) for model in MODELS]
    better = [study.above(auroc(results, model, "mcm"), auroc(results, model, "msp")) for model in MODELS]
    return {
        "a temperature fitted on other pictures lowers the calibration error": study.verdict(*lower),
        "cosines without the model's scale know unknown concepts better than its probabilities": study.verdict(*better),
    }


def table(results):
    share = lambda value: f"{100 * value:.1f}"
    calibrated = [
        [
            f"`{model}`",
            *(share(own[f"calibration/{key}"]) for key in ("top1", "confidence", "error", "scaled/error")),
            f"{own['calibration/temperature']:.2f}",
        ]
        for model in MODELS
        for own in [results[model]["calibration"]]
    ]
    unknown = [
        [score, *(share(results[model]["unknown"][f"out_of_distribution/{score}/{key}"])
                  for model in MODELS for key in ("auroc", "fpr95"))]
        for score in SCORES
    ]  # fmt: skip
    corrupted = [
        [
            kind.replace("_", " "),
            *(share(results[model][f"{kind} {level}"]) for model in MODELS for level in SEVERITIES),
        ]
        for kind in CORRUPTIONS
    ]
    clean = [share(results[model]["clean"]) for model in MODELS]
    heads = [f"`{model}`, severity {level}" for model in MODELS for level in SEVERITIES]
    return "\n\n".join((
        study.markdown(["model", "top-1, %", "confidence, %", "error, %", "scaled, %", "temperature"], calibrated),
        study.markdown(["score", *(f"`{m}` {key}, %" for m in MODELS for key in ("AUROC", "FPR95"))], unknown),
        study.markdown(["top-1, %, without corruption", *(f"`{model}`" for model in MODELS)], [["", *clean]]),
        study.markdown(["top-1, %", *heads], corrupted),
        study.claims(verdicts(results)),
    ))  # fmt: skip


def plot(results):
    figure, ax = study.subplots(size=(7, 4.6))
    kinds = list(CORRUPTIONS)
    height = 0.8 / len(MODELS)
    for i, model in enumerate(MODELS):
        kept = [results[model][f"{kind} 3"] / results[model]["clean"] for kind in kinds]
        places = [place + (i - (len(MODELS) - 1) / 2) * height for place in range(len(kinds))]
        ax.barh(places, kept, height, color=study.SHADES[len(MODELS) - 1 - i], label=model, **study.BAR)
    ax.set_yticks(range(len(kinds)), [kind.replace("_", " ") for kind in kinds])
    ax.invert_yaxis()
    ax.set_xlabel("top-1 at severity 3, as a share of the top-1 without corruption")
    figure.legend(loc="outside upper right", ncols=len(MODELS))
    return figure


def main():
    results = study.read("robustness", {})
    for model in MODELS:
        if model not in results:
            results[model] = measure(model)
            study.save("robustness", results)
    study.publish("robustness", table, plot, verdicts)


if __name__ == "__main__":
    main()
