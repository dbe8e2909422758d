"""Calibration: a model's confidence against its accuracy."""

from typing import Any

import numpy as np

from vlm_jax.evaluators.metrics.uncertainty import calibration_bins
from vlm_jax.report.figures import style
from vlm_jax.report.figures.style import BAR, BLUE, GREY, INK, Picture


@style.styled()
def calibration(confidence: Any, correct: Any, bins: int = 15) -> Picture:
    """Draws a reliability diagram: accuracy by confidence, and the share of examples in each bin.

    Args: see `calibration_bins`.
    """
    confidence, correct = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    style.check(confidence.shape == correct.shape and confidence.ndim == 1 and confidence.size,
                "confidence [n] and correct [n]", confidence, correct)  # fmt: skip
    style.check(bool(np.all((confidence >= 0) & (confidence <= 1 + 1e-6))), "probabilities in [0, 1]", confidence)
    found = calibration_bins(confidence, correct, bins)
    some = found.counts > 0
    left, width = found.edges[:-1][some], 1 / bins
    right, sure = found.accuracy[some], found.confidence[some]
    picture = Picture(figsize=(4.6, 5.0), layout="constrained")
    top, low = picture.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.bar(left, right, width, align="edge", color=BLUE, edgecolor=INK, linewidth=0.7, label="share that is right")
    top.bar(left, sure - right, width, right, align="edge", color="none", edgecolor=GREY, hatch="////", linewidth=0.7,
            label="gap to the mean confidence")  # fmt: skip
    top.plot([0, 1], [0, 1], "--", color=INK, linewidth=1, label="as sure as right")
    top.set_ylim(0, 1)
    top.set_ylabel("right")
    top.legend(loc="upper left")
    accuracy, mean = np.mean(correct), np.mean(confidence)
    top.set_title(f"expected calibration error {100 * found.error:.1f} %\n"
                  f"right {100 * accuracy:.1f} %, mean confidence {100 * mean:.1f} %")  # fmt: skip
    low.bar(found.edges[:-1], found.counts / found.counts.sum(), width, align="edge", color=BAR, edgecolor=INK,
            linewidth=0.7)  # fmt: skip
    low.set_ylabel("share of\npictures")
    low.set_xlabel("confidence")
    low.set_xlim(0, 1)
    return picture
