"""Sources by URI: records by index."""

from vlm_jax.data.source import Source, select
from vlm_jax.data.sources.folder import Folder
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
        `jsonl:/path`, `csv:/path`, `folder:/path`, or `precomputed:/path` (see `vlm_jax.precompute`). `tfds:emoji` is
        the data set in this package.
      split: a TFDS split such as "train" or "train[:90%]"; a sub-folder of `folder:`; the others have none.

    Raises:
      UserError: the scheme is unknown, or a file or a split does not exist.
    """
    scheme, colon, path = uri.partition(":")
    if not colon or scheme not in SCHEMES:
        raise UserError(
            f"data source `{uri}` has no known scheme; expected one of {', '.join(s + ':' for s in SCHEMES)}"
        )
    if scheme in WITH_SPLITS:
        return SCHEMES[scheme](path, split)
    if split is not None:
        raise UserError(f"data source `{uri}` has no splits, got split `{split}`; leave it out")
    return SCHEMES[scheme](path)


def train_split_of(uri: str, split: str | None) -> str | None:
    """Returns `split`, or None in the place of the default "train" if the source has no splits."""
    return None if split == "train" and uri.partition(":")[0] not in WITH_SPLITS else split


SCHEMES = {
    "tfds": Tfds,
    "wds": TarShards,
    "jsonl": Jsonl,
    "csv": Csv,
    "folder": Folder,
    "precomputed": lambda path: Precomputed(path, open_source),
}
WITH_SPLITS = ("tfds", "folder")
