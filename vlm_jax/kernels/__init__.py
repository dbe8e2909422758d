"""Kernels, each beside its plain reference."""

from vlm_jax.kernels.attention import Choice, attention, explain
from vlm_jax.kernels.contrastive import pairwise_logsumexp, pairwise_sigmoid_loss

__all__ = ["Choice", "attention", "explain", "pairwise_logsumexp", "pairwise_sigmoid_loss"]
