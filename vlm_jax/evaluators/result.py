"""The result of an evaluator."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Result(NamedTuple):
    """Metrics to log and artifacts to look at.

    Attributes:
      metrics: name -> number, shares in [0, 1].
      artifacts: name -> array, list or a dict of arrays and lists; `report.save_artifacts` writes them.
      intervals: name of a metric -> its 95 % confidence interval, see `metrics.interval`.
      notes: what a reader of the metrics should know, a sentence each.
    """

    metrics: dict[str, float]
    artifacts: dict[str, Any]
    intervals: Mapping[str, Sequence[float]] = {}
    notes: Sequence[str] = ()

    def as_results(self, prefix: str = "") -> dict[str, Any]:
        """The entries of results.json: `PREFIX/METRIC`, `PREFIX/METRIC/interval` and `PREFIX/notes`."""
        found: dict[str, Any] = {}
        for name, value in self.metrics.items():
            found[name] = value
            if name in self.intervals:
                found[f"{name}/interval"] = list(self.intervals[name])
        found |= {"notes": list(self.notes)} if self.notes else {}
        return {f"{prefix}/{name}": value for name, value in found.items()} if prefix else found
