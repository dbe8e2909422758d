"""Pure functions from scores and ranks to metrics. `metrics.captions` holds the metrics of captions."""

from vlm_jax.evaluators.metrics.classification import confusions, mean_per_class_accuracy, top_k_accuracy
from vlm_jax.evaluators.metrics.continual import after_stages, continual
from vlm_jax.evaluators.metrics.intervals import class_weights, interval, intervals, percentiles, resampled
from vlm_jax.evaluators.metrics.multi_label import average_precision, mean_average_precision, resampled_map
from vlm_jax.evaluators.metrics.ranking import (
    Pairs,
    Ranks,
    overlap,
    recall,
    retrieval_ranks,
    retrieval_recall,
    top_k,
    truth_ranks,
)

__all__ = [
    "Pairs",
    "Ranks",
    "after_stages",
    "average_precision",
    "class_weights",
    "confusions",
    "continual",
    "interval",
    "intervals",
    "mean_average_precision",
    "mean_per_class_accuracy",
    "overlap",
    "percentiles",
    "recall",
    "resampled",
    "resampled_map",
    "retrieval_ranks",
    "retrieval_recall",
    "top_k",
    "top_k_accuracy",
    "truth_ranks",
]
