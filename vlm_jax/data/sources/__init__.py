"""Sources by URI: records by index."""

import difflib
import os

from vlm_jax.data import storage
from vlm_jax.data.scenes.source import Scenes
from vlm_jax.data.source import Source, select
from vlm_jax.data.sources.array_records import ArrayRecords
from vlm_jax.data.sources.folder import Folder, holds_splits
from vlm_jax.data.sources.parquet import Parquet
from vlm_jax.data.sources.precomputed import Precomputed
from vlm_jax.data.sources.table import Csv, Jsonl
from vlm_jax.data.sources.tar_shards import TarShards
from vlm_jax.data.sources.tfds import Tfds
from vlm_jax.errors import UserError

__all__ = ["Source", "open_source", "select", "train_split_of"]


def open_source(uri: str, split: str | None = None) -> Source:
    """Opens a source.

    Args:
      uri: `tfds:name[/config][:version]` or `tfds:/folder/of/a/prepared/version`, `wds:/path/{000..999}.tar`,
        `arrayrecord:/path/*.array_record`, `parquet:/path/*.parquet`, `jsonl:/path`, `csv:/path`, `folder:/path`, or
        `precomputed:/path` (see `vlm_jax.precompute`). `tfds:emoji`, and `scenes:` composed from it, are the data sets
        in this package. With `?allow_outside` at its end, pictures may be outside of the folder of the table or of
        `folder:`. With `?index=/folder` at the end of `wds:`, the index of the shards is there, else beside them: see
        `vlm_jax.index`. Shards of `wds:` may be in a store: `wds:s3://bucket/{000..999}.tar`, `gs://`, `https://`.
      split: a TFDS split such as "train" or "train[:90%]"; a sub-folder of `folder:`; a split of `scenes:`; the others
        have none.

    Raises:
      UserError: the scheme is unknown, or a file or a split does not exist.
    """
    scheme, colon, path = uri.removesuffix(ALLOW_OUTSIDE).partition(":")
    if not colon or scheme not in SCHEMES:
        if storage.is_remote(uri):
            raise UserError(f"data source `{uri}` has no known scheme; did you mean `wds:{uri}`?")
        close = difflib.get_close_matches(scheme, SCHEMES, n=1) if colon else [_scheme_of(uri)]
        hint = f"; did you mean `{close[0]}:{path or uri}`?" if close and close[0] else ""
        schemes = ", ".join(f"{known}:" for known in SCHEMES)
        raise UserError(f"data source `{uri}` has no known scheme; expected one of {schemes}{hint}")
    if "\0" in path:
        raise UserError(f"data source {uri!r} is no path")
    path = os.path.expanduser(storage.local(path))
    if storage.is_remote(path) and scheme not in REMOTE:
        raise UserError(
            f"data source `{uri}`: `{scheme}:` reads files on disk; copy them to one, or write tar shards for `wds:`, "
            "which are read from a store"
        )
    if split is not None and scheme not in WITH_SPLITS:
        raise UserError(f"data source `{uri}` has no splits, got split `{split}`; leave it out (split=None)")
    outside = uri.endswith(ALLOW_OUTSIDE)
    if scheme == "precomputed":  # what the folder names has the caller's permission, whatever the folder says
        inner = lambda uri, split: open_source(uri.removesuffix(ALLOW_OUTSIDE) + ALLOW_OUTSIDE * outside, split)
        return Precomputed(path, inner)
    source = SCHEMES[scheme](path, split) if scheme in WITH_SPLITS else SCHEMES[scheme](path)
    if outside:
        source.allow_outside = True
    return source


ALLOW_OUTSIDE = "?allow_outside"


def _scheme_of(path: str) -> str | None:
    """Returns the scheme for a path that stands without one, None if nothing tells."""
    endings = {".jsonl": "jsonl", ".csv": "csv", ".tsv": "csv", ".tar": "wds", ".parquet": "parquet"}
    endings |= {".array_record": "arrayrecord"}
    folder = "folder" if os.path.isdir(os.path.expanduser(path)) else None
    return endings.get(os.path.splitext(path)[1].lower(), folder)


def train_split_of(uri: str, split: str | None) -> str | None:
    """Returns `split`, or None in the place of the default "train" if the source has no splits."""
    scheme, _, path = uri.removesuffix(ALLOW_OUTSIDE).partition(":")
    has_splits = holds_splits(path) if scheme == "folder" else scheme in WITH_SPLITS
    return None if split == "train" and not has_splits else split


SCHEMES = {
    "tfds": Tfds,
    "wds": TarShards,
    "arrayrecord": ArrayRecords,
    "parquet": Parquet,
    "jsonl": Jsonl,
    "csv": Csv,
    "folder": Folder,
    "precomputed": Precomputed,
    "scenes": Scenes.open,
}
REMOTE = ("wds", "arrayrecord")  # the second says why not
WITH_SPLITS = ("tfds", "folder", "scenes")
