"""`precomputed:`: embeddings instead of pictures, written by `python -m vlm_jax.precompute`.

The folder holds index.json (the data set, image tower, initial parameters and preprocessing) and ArrayRecord shards:
one float32 vector for each record of the data set, in order; an empty vector if the picture could not be used.
"""

import copy
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np
from array_record.python import array_record_module

from vlm_jax.data.source import BadExample, Source
from vlm_jax.errors import UserError

INDEX = "index.json"


class Precomputed(Source):
    """The records of a data set, with an embedding, float32 [D], under "image".

    Args:
      path: the folder.
      open_source: opens the data set by URI and split.
    """

    with_image = True

    def __init__(self, path: str, open_source: Callable[[str, str | None], Source]):
        from grain.sources import ArrayRecordDataSource  # imports JAX; 2 s, hence here

        self.path = Path(path)
        if not (self.path / INDEX).is_file():
            raise UserError(f"data source `precomputed:{path}` has no {INDEX}; write it with vlm_jax.precompute")
        index = json.loads((self.path / INDEX).read_text())
        shards = [self.path / name for name in shard_names(index["records"], index["shard_size"])]
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing:
            raise UserError(
                f"data source `precomputed:{path}` lacks {len(missing)} of {len(shards)} shards, {missing[0]} first; "
                "run the same vlm_jax.precompute again to write the rest"
            )
        self.source = open_source(index["uri"], index["split"])
        self.embeddings = ArrayRecordDataSource([str(shard) for shard in shards])
        if not len(self.source) == len(self.embeddings) == index["records"]:
            raise UserError(
                f"data source `precomputed:{path}` has {len(self.embeddings)} embeddings, {index['uri']} has "
                f"{len(self.source)} records: the data set has changed; write to another folder"
            )

    def __len__(self) -> int:
        return len(self.source)

    def label_names(self, path: str) -> dict[int, str] | None:
        return self.source.label_names(path)

    def narrow(self, paths: frozenset[str]) -> Self:
        narrowed = copy.copy(self)
        narrowed.source, narrowed.with_image = self.source.narrow(paths - {"image"}), "image" in paths
        return narrowed

    def __getitem__(self, i: int) -> dict[str, Any]:
        record = self.source[i]
        if self.with_image:
            embedding = np.frombuffer(self.embeddings[i], np.float32)
            if not embedding.size:
                raise BadExample("the picture could not be embedded")
            record["image"] = embedding
        return record

    def key(self, i: int) -> str:
        return self.source.key(i)


def shard_names(records: int, shard_size: int) -> list[str]:
    """Returns the file names of the shards of `records` records."""
    count = -(-records // shard_size)
    return [f"embeddings-{k:05d}-of-{count:05d}.array_record" for k in range(count)]


def write_shard(path: Path, embeddings: Iterable[np.ndarray | None]) -> None:
    """Writes float32 [D], or None for an unusable picture, each; the file appears once complete."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
    for embedding in embeddings:
        writer.write(b"" if embedding is None else np.asarray(embedding, np.float32).tobytes())
    writer.close()
    os.replace(temporary, path)
