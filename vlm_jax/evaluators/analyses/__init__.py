"""Analyses of checkpoints and runs, without data: what tuning changed, how losses scale."""
