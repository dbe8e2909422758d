"""Pure functions from scores, ranks and texts to numbers. Those of captions stand in `metrics.captions`."""

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
