"""Pure functions from scores and ranks to metrics. `metrics.captions` holds the metrics of captions."""

from vlm_jax.evaluators.metrics.classification import confusions, mean_per_class_accuracy, top_k_accuracy
from vlm_jax.evaluators.metrics.ranking import recall, retrieval_ranks, retrieval_recall, top_k, truth_ranks

__all__ = [
    "confusions",
    "mean_per_class_accuracy",
    "recall",
    "retrieval_ranks",
    "retrieval_recall",
    "top_k",
    "top_k_accuracy",
    "truth_ranks",
]
