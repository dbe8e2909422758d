"""Kernels, each beside its plain reference."""

from vlm_jax.kernels.attention import Choice, attention, explain

__all__ = ["Choice", "attention", "explain"]
