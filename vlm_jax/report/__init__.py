"""Reports of runs and evaluations: a page, live curves, figures."""

from vlm_jax.report.page import format_results, format_value, load_artifacts, save_artifacts, series, write

__all__ = ["format_results", "format_value", "load_artifacts", "save_artifacts", "series", "write"]
