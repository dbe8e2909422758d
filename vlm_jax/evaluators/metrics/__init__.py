"""Pure functions from scores and ranks to metrics. `metrics.captions` holds the metrics of captions."""

from vlm_jax.evaluators.metrics.classification import confusions, mean_per_class_accuracy, top_k_accuracy
from vlm_jax.evaluators.metrics.continual import after_stages, continual
from vlm_jax.evaluators.metrics.intervals import class_weights, interval, intervals, percentiles, resampled
from vlm_jax.evaluators.metrics.multi_label import average_precision, mean_average_precision, resampled_map
from vlm_jax.evaluators.metrics.paired import Paired, paired
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
from vlm_jax.evaluators.metrics.representation import (
    alignment,
    cka,
    effective_rank,
    frechet,
    integration_rate,
    modality_gap,
    neighbour_overlap,
    uniformity,
)
from vlm_jax.evaluators.metrics.uncertainty import (
    BELONGING,
    belonging,
    brier,
    calibration_bins,
    detection,
    mahalanobis,
    negative_log_likelihood,
    temperature,
)

__all__ = [
    "BELONGING",
    "Paired",
    "Pairs",
    "Ranks",
    "after_stages",
    "alignment",
    "average_precision",
    "belonging",
    "brier",
    "calibration_bins",
    "cka",
    "class_weights",
    "confusions",
    "continual",
    "detection",
    "effective_rank",
    "frechet",
    "integration_rate",
    "interval",
    "intervals",
    "mahalanobis",
    "mean_average_precision",
    "mean_per_class_accuracy",
    "modality_gap",
    "negative_log_likelihood",
    "neighbour_overlap",
    "overlap",
    "paired",
    "percentiles",
    "recall",
    "resampled",
    "resampled_map",
    "retrieval_ranks",
    "retrieval_recall",
    "temperature",
    "top_k",
    "top_k_accuracy",
    "truth_ranks",
    "uniformity",
]
