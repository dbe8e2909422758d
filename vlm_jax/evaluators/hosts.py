"""Evaluation on several hosts: each reads its share of every batch, all embed together, the first one counts."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from vlm_jax import sharding


class Hosts:
    """The processes that a model runs on, and which rows of a batch each of them reads.

    Attributes:
      batch_size: examples of a batch over all processes: `batch_size`, on several rounded up to a multiple of the
        devices that share a batch, so that every row's device is known.
      count, index: into how many equal parts a batch is split for reading, and which part this process reads.
        Processes whose devices hold the same rows (the mesh's `tensor` axis) read the same part.
      first: whether this process counts and writes.
    """

    def __init__(self, mesh: Mesh | None, batch_size: int):
        self.batch_size, self.count, self.index, self.first = batch_size, 1, 0, True
        self._several = mesh is not None and len({device.process_index for device in mesh.devices.flat}) > 1
        if not self._several:
            return
        self.first = jax.process_index() == 0
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        size = self.batch_size = -(-batch_size // shards) * shards
        held = sharding.batch_sharding(mesh).addressable_devices_indices_map((size,)).values()
        start = min(rows.start or 0 for (rows,) in held)
        part = max(size if rows.stop is None else rows.stop for (rows,) in held) - start
        if size % part == start % part == 0:  # else every process reads everything
            self.count, self.index = size // part, start // part

    def place(self, pretrained: Any) -> Any:
        """The model, so that it embeds a batch of `batch_size` as one, in the order of its rows."""
        return dataclasses.replace(pretrained, batch_size=self.batch_size) if self._several else pretrained

    def whole(self, images: Any) -> Any:
        """This process's rows of a batch (a tree of arrays [b, ...]) at their place in one of [batch_size, ...].

        The other rows are zero: their devices belong to processes that have read them.
        """
        return images if self.count == 1 else jax.tree.map(self._put, images)

    def _put(self, part: np.ndarray) -> np.ndarray:
        whole = np.zeros((self.batch_size, *part.shape[1:]), part.dtype)
        whole[self.index * len(part) : (self.index + 1) * len(part)] = part
        return whole

    def gather(self, values: list) -> list:
        """This process's part of a list of JSON-able values -> all of it, in the order of the batch's rows."""
        if self.count == 1:
            return values
        parts = dict(self._exchange([self.index, values]))
        return [value for i in range(self.count) for value in parts[i]]

    def from_first(self, value: Any) -> Any:
        """The first process's JSON-able value."""
        return self._exchange(value)[0] if self._several else value

    def _exchange(self, value: Any) -> list:
        payload = np.frombuffer(json.dumps(value).encode(), np.uint8)
        sizes = np.ravel(multihost_utils.process_allgather(np.int32(len(payload))))
        room = 1 << int(sizes.max()).bit_length()  # a power of two: few shapes are compiled
        padded = np.pad(payload, (0, room - len(payload)))
        rows = multihost_utils.process_allgather(padded)
        return [json.loads(bytes(row[:size])) for row, size in zip(np.asarray(rows), sizes, strict=True)]
