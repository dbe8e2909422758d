"""Metrics of continual learning, from the accuracy on every data set after every stage."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.errors import UserError


def continual(accuracy: np.ndarray, before: np.ndarray | None = None) -> dict[str, float]:
    """Returns what a model has learned, forgotten and kept over the stages of a run.

    Args:
      accuracy: float [T, E], after stage i on data set j. Data set j < T is that of stage j; others, j >= T, belong to
        no stage.
      before: float [E], of the model before the first stage.

    Returns:
      average: mean_j A[T-1, j], j < T (Lopez-Paz and Ranzato 2017, arXiv:1706.08840).
      forgetting: mean_j max_{i<T-1} A[i, j] - A[T-1, j], j < T - 1 (Chaudhry et al. 2018, arXiv:1801.10112).
      backward_transfer: mean_j A[T-1, j] - A[j, j], j < T - 1 (arXiv:1706.08840); below 0, stages were forgotten.
      forward_transfer: mean_j A[j-1, j] - before[j], 0 < j < T (arXiv:1706.08840). With `before`.
      zero_shot_kept: mean_j A[T-1, j] / mean_j before[j], j >= T. With `before`, if there are such data sets.
      Without a stage to compare with, forgetting and the transfers are NaN.

    Raises:
      UserError: the shapes do not fit.
    """
    accuracy = np.asarray(accuracy, np.float64)
    if accuracy.ndim != 2 or not 1 <= len(accuracy) <= accuracy.shape[1]:
        raise UserError(f"accuracies have the shape {accuracy.shape}; expected [stages, data sets], a data set a stage")
    stages, sets = accuracy.shape
    if before is not None and np.shape(before) != (sets,):
        raise UserError(f"accuracies before the first stage have the shape {np.shape(before)}; expected ({sets},)")
    last, own = accuracy[-1], np.diag(accuracy)
    mean = lambda values: float(np.mean(values)) if len(values) else float("nan")
    found = {
        "average": mean(last[:stages]),
        "forgetting": mean(np.max(accuracy[:-1, : stages - 1], axis=0, initial=-np.inf) - last[: stages - 1]),
        "backward_transfer": mean(last[: stages - 1] - own[:-1]),
    }
    if before is None:
        return found
    before = np.asarray(before, np.float64)
    found["forward_transfer"] = mean(np.diag(accuracy, k=1)[: stages - 1] - before[1:stages])
    if sets > stages:
        found["zero_shot_kept"] = mean(last[stages:]) / mean(before[stages:])
    return found


def after_stages(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], names: Sequence[str], steps: Sequence[int]
) -> np.ndarray:
    """Returns the accuracies [T, E] for `continual`, from the log of a run.

    Args:
      series: metric -> (steps, values), `vlm_jax.report.page.series(workdir)`.
      names: of E metrics, "<evaluation>/top1"; first those of the stages, in order.
      steps: the last steps of the T stages; 0 means before the first.

    Raises:
      UserError: a metric has no value at a step.
    """

    def at(name: str, step: int) -> Any:
        found = dict(zip(*series.get(name, ((), ())), strict=True))
        if step not in found:
            known = ", ".join(f"{one:g}" for one in found) or f"none; metrics: {', '.join(series)}"
            raise UserError(f"`{name}` has no value at step {step}; it has values at steps: {known}")
        return found[step]

    return np.array([[at(name, step) for name in names] for step in steps])
