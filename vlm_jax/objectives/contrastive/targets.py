"""Targets: the pairs of images and texts in a batch that match."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.errors import UserError
from vlm_jax.objectives.objective import WHERE


def positives(targets: str, batch: Mapping[str, Any], size: int) -> jax.Array:
    """Returns bool [B, B]: which texts (columns) describe which images (rows).

    Args:
      targets: "identity": text i describes image i alone. Or a batch key with an entry [B]: an image and a text with
        equal values describe each other.
      batch: the batch.
      size: B.
    """
    if targets == "identity":
        return jnp.eye(size, dtype=bool)
    labels = labels_of(targets, batch, size)
    return labels[:, None] == labels[None, :]


def labels_of(targets: str, batch: Mapping[str, Any], size: int) -> jax.Array:
    """Returns labels [B]: an image and a text with equal labels match. Arguments as for `positives`."""
    if targets == "identity":
        return jnp.arange(size)
    if targets not in batch:
        raise UserError(
            f"{WHERE}.targets is `{targets}`, which the batch lacks; expected `identity` or one of: {', '.join(batch)}"
        )
    labels = batch[targets]
    if labels.shape != (size,):
        raise UserError(f"{WHERE}.targets `{targets}` has shape {labels.shape} in the batch; expected ({size},)")
    return labels
