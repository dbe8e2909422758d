"""Evaluation on several hosts: each reads its share of a batch, all embed together, the first counts."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vlm_jax.params import sharding
from vlm_jax.run import processes


class Hosts:
    """The processes that a model runs on, and the rows of a batch that each process reads.

    Attributes:
      batch_size: examples of a batch over all processes. On several processes `batch_size` is rounded up to a multiple
        of the devices that share a batch, so that every row has a known device.
      rows: the rows of a batch that this process reads; None: all. Processes whose devices hold the same rows (the
        mesh's `tensor` axis) read the same rows.
      first: whether this process counts and writes.
      several: whether the model runs on several processes.
    """

    def __init__(self, mesh: Mesh | None, batch_size: int):
        self.batch_size, self.rows, self.first = batch_size, None, True
        self.several = mesh is not None and len({device.process_index for device in mesh.devices.flat}) > 1
        if self.several:
            shards = mesh.shape["data"] * mesh.shape["fsdp"]
            self.batch_size = -(-batch_size // shards) * shards
            self.rows = sharding.rows_of_process(mesh, self.batch_size)
            self.first = processes.is_first()

    def place(self, pretrained: Any) -> Any:
        """The model with batch size `batch_size`: it embeds such a batch as one, in the order of the rows."""
        return dataclasses.replace(pretrained, batch_size=self.batch_size) if self.several else pretrained

    def whole(self, images: Any) -> Any:
        """Puts this process's rows (a tree of arrays [b, ...]) at their places in arrays [batch_size, ...].

        The other rows are zero: their devices belong to the processes that have read these rows.
        """
        return images if self.rows is None else jax.tree.map(self._put, images)

    def _put(self, part: np.ndarray) -> np.ndarray:
        whole = np.zeros((self.batch_size, *part.shape[1:]), part.dtype)
        whole[self.rows] = part
        return whole

    def gather(self, values: list) -> list:
        """Values (JSON-able) of this process's rows -> the values of all rows, in order."""
        if self.rows is None:
            return values
        by_row = {}
        for rows, part in processes.exchange([self.rows.tolist(), values]):
            by_row |= zip(rows, part, strict=True)
        return [by_row[row] for row in range(self.batch_size)]

    def from_first(self, value: Any) -> Any:
        """The first process's JSON-able value."""
        return processes.exchange(value)[0] if self.several else value
