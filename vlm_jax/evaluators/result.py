"""The result of an evaluator."""

from typing import Any, NamedTuple


class Result(NamedTuple):
    """Metrics to log and artifacts to look at.

    Attributes:
      metrics: name -> number, shares in [0, 1].
      artifacts: name -> array, list or a dict of arrays and lists; `report.save_artifacts` writes them.
    """

    metrics: dict[str, float]
    artifacts: dict[str, Any]
