"""Readers of checkpoint files, which execute nothing."""
