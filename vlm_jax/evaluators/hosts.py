"""Evaluation on several hosts: each reads its share of every batch, all embed together, the first one counts."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vlm_jax.params import sharding
from vlm_jax.run import processes


class Hosts:
    """The processes that a model runs on, and which rows of a batch each of them reads.

    Attributes:
      batch_size: examples of a batch over all processes: `batch_size`, on several rounded up to a multiple of the
        devices that share a batch, so that every row's device is known.
      rows: of a batch that this process reads; None: all. Processes whose devices hold the same rows (the mesh's
        `tensor` axis) read the same.
      first: whether this process counts and writes.
    """

    def __init__(self, mesh: Mesh | None, batch_size: int):
        self.batch_size, self.rows, self.first = batch_size, None, True
        self._several = mesh is not None and len({device.process_index for device in mesh.devices.flat}) > 1
        if self._several:
            shards = mesh.shape["data"] * mesh.shape["fsdp"]
            self.batch_size = -(-batch_size // shards) * shards
            self.rows = sharding.rows_of_process(mesh, self.batch_size)
            self.first = processes.is_first()

    def place(self, pretrained: Any) -> Any:
        """The model, so that it embeds a batch of `batch_size` as one, in the order of its rows."""
        return dataclasses.replace(pretrained, batch_size=self.batch_size) if self._several else pretrained

    def whole(self, images: Any) -> Any:
        """This process's rows of a batch (a tree of arrays [b, ...]) at their place in one of [batch_size, ...].

        The other rows are zero: their devices belong to processes that have read them.
        """
        return images if self.rows is None else jax.tree.map(self._put, images)

    def _put(self, part: np.ndarray) -> np.ndarray:
        whole = np.zeros((self.batch_size, *part.shape[1:]), part.dtype)
        whole[self.rows] = part
        return whole

    def gather(self, values: list) -> list:
        """Values (JSON-able) of this process's rows -> those of all rows, in their order."""
        if self.rows is None:
            return values
        by_row = {}
        for rows, part in processes.exchange([self.rows.tolist(), values]):
            by_row |= zip(rows, part, strict=True)
        return [by_row[row] for row in range(self.batch_size)]

    def from_first(self, value: Any) -> Any:
        """The first process's JSON-able value."""
        return processes.exchange(value)[0] if self._several else value
