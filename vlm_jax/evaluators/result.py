"""What an evaluator returns."""

from typing import Any, NamedTuple


class Result(NamedTuple):
    """Numbers to log and material to look at.

    Attributes:
      metrics: name -> number, shares in [0, 1].
      artifacts: name -> array, list or a dict of those; `report.save_artifacts` writes them.
    """

    metrics: dict[str, float]
    artifacts: dict[str, Any]
