"""Adapting trained models to new tasks from a few examples."""
