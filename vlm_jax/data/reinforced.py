"""A reinforced data set: some views of each example, embedded once by teachers (MobileCLIP, arXiv:2311.17049).

View v of record i is what the ops make of it with the randomness of (seed, i, v), so that no picture is stored. The
folder holds index.json and ArrayRecord shards, as those of `precomputed:`: one float16 vector for each view, the views
of a record one after the other; an empty vector if the view could not be used. `vlm-jax precompute --views` writes it.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.data import confined
from vlm_jax.data.source import BadExample
from vlm_jax.data.sources.precomputed import open_shards, read_index
from vlm_jax.errors import UserError

KINDS = dict(views=(int,), seed=(int,), ops=(str,), fields=(dict,), teachers=(dict,), fingerprint=(str,))
KEEP = re.compile(r"\|\s*keep\([^()]*\)\s*$")  # of the last op, which draws nothing


class Reinforced:
    """The views of a data set.

    Args:
      path: the folder.
      uri, split, ops: of the data set that reads them.
      records, fingerprint: of its source.

    Attributes:
      views: number of views of a record.
      seed: of the views' randomness.
      teachers: name -> spec.

    Raises:
      UserError: the folder cannot be read, or holds views of other data or other ops.
    """

    def __init__(self, path: str, uri: str, split: str | None, ops: str, records: int, fingerprint: str):
        what = f"config.data.reinforced `{path}`"
        index = read_index(Path(path), what, KINDS)
        widths = index["fields"].values()
        sound = index["views"] > 0 <= index["seed"] < 2**64 and widths
        if not sound or any(type(width) is not int or width < 1 for width in widths):
            seen = f"{index['views']} views of {index['fields']!r:.80}, seed {index['seed']}"
            raise UserError(f"{what}: its index.json has {seen}; precompute it anew")
        for name, own in dict(uri=uri, split=split, records=records * index["views"]).items():
            if index[name] != own:
                raise UserError(f"{what} is of {name} {index[name]!r:.80}, the config of {own!r}; precompute it anew")
        if index["fingerprint"] != fingerprint:
            raise UserError(f"{what} is of `{uri}` before it changed; precompute it anew")
        if KEEP.sub("", index["ops"]) != KEEP.sub("", ops):
            raise UserError(f"{what} is of other ops than the config's, `{index['ops']:.200}`; precompute it anew")
        self.views, self.seed, self.fields = index["views"], index["seed"], index["fields"]
        self.teachers, self.width = index["teachers"], sum(index["fields"].values())
        self.rows, self.files = open_shards(Path(path), index, what)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Returns what teachers say of a view, {"<teacher>/<output>": float32 [D]}."""
        vector = np.frombuffer(self.rows[row], np.float16)
        if vector.size != self.width:
            raise BadExample("the view could not be embedded", "picture")
        ends = np.cumsum([*self.fields.values()])[:-1]
        return dict(zip(self.fields, np.split(vector.astype(np.float32), ends), strict=True))

    def fingerprint(self) -> str:
        """Returns a short hash that changes with the files."""
        return confined.fingerprint(self.files)
