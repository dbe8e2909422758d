"""A queue of the last features of earlier steps: the memory of a term, sharded by rows, in the checkpoints."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp


class Queue(NamedTuple):
    """The last `size` rows of some features, rounded up to whole batches; empty at first (MoCo, arXiv:1911.05722).

    Its state holds the features [rows, ...], `filled` bool [rows], and `next`, the row that is written next.

    Attributes:
      keys: of the features, a dict of arrays [B, ...].
      size: number of rows.
    """

    keys: tuple[str, ...]
    size: int

    def init(self, features: Mapping[str, Any]) -> dict[str, Any]:
        """Returns an empty queue; of the features, only shapes and dtypes count."""
        batch = len(features[self.keys[0]])
        rows = -(-self.size // batch) * batch
        empty = {key: jnp.zeros((rows, *features[key].shape[1:]), features[key].dtype) for key in self.keys}
        return empty | {"filled": jnp.zeros(rows, bool), "next": jnp.zeros((), jnp.int32)}

    def update(self, state: Mapping[str, Any], features: Mapping[str, Any], ctx: Any) -> dict[str, Any]:
        """Returns the queue with a batch in the place of its oldest rows; `ctx` is not read."""
        batch, rows = len(features[self.keys[0]]), len(state["filled"])
        at = (state["next"] + jnp.arange(batch)) % rows  # batches may have several sizes
        put = lambda old, new: old.at[at].set(new, unique_indices=True)
        written = {key: put(state[key], features[key]) for key in self.keys}
        return written | {"filled": put(state["filled"], jnp.ones(batch, bool)), "next": (state["next"] + batch) % rows}
