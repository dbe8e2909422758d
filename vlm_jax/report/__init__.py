"""Reports of runs and evaluations: a page, live curves, figures."""

from vlm_jax.report.about import save_about
from vlm_jax.report.page import load_artifacts, save_artifacts, series, write
from vlm_jax.report.values import format_results, format_value

__all__ = ["format_results", "format_value", "load_artifacts", "save_about", "save_artifacts", "series", "write"]
