"""Stops a diverging run at its first non-finite step, and names the parameters with the largest gradients."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from vlm_jax.errors import UserError
from vlm_jax.params.table import named_leaves


def gradient_norms(grads: Any) -> dict[str, jax.Array]:
    """Returns the gradient norm of each group of parameters; names with equal first two parts form a group."""
    groups = {}
    for name, leaf in named_leaves(grads).items():
        groups.setdefault("/".join(name.split("/")[:2]), []).append(leaf)
    return {group: optax.tree.norm(leaves) for group, leaves in groups.items()}


def check_finite(
    step: int, metrics: Mapping[str, jax.Array], norms: Mapping[str, jax.Array], saved: int | None
) -> None:
    """Waits for step `step` and raises a UserError if its loss or gradient is not finite."""
    if np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]):
        return
    size = lambda group: float(norms[group]) if np.isfinite(norms[group]) else np.inf
    largest = ", ".join(f"{group} {float(norms[group]):.3g}" for group in sorted(norms, key=size, reverse=True)[:5])
    raise UserError(
        f"step {step}: loss is {float(metrics['loss'])}, gradient norm {float(metrics['grad_norm'])}; "
        f"largest by group: {largest}. The newest checkpoint is of step {saved}. "
        "Lower config.optimizer.lr or set config.optimizer.clip_norm"
    )
