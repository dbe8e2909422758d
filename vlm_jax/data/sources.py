"""Sources by URI: records by index."""

import copy
import csv
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from vlm_jax.data import emoji
from vlm_jax.data.registry import BadExample, field
from vlm_jax.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
# The columns of a table that may hold an image's path, in this order of preference.
PATH_COLUMNS = ("image", "image_path", "file_path", "filepath", "file_name", "filename", "path")


class Source:
    """Records by index; picklable, for worker processes."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, i: int) -> dict[str, Any]:
        """The raw record: encoded bytes under "image", text and numbers under their own names."""
        raise NotImplementedError

    def key(self, i: int) -> str:
        """What a person would call the record: a file, a line, a member of a shard."""
        raise NotImplementedError

    def narrow(self, paths: frozenset[str]) -> Self:
        """The same records, where fields whose paths are not among `paths` may be left out, if that is cheaper."""
        return self


def open_source(uri: str, split: str | None = None) -> Source:
    """Opens a source.

    Args:
      uri: `tfds:name[/config][:version]` or `tfds:/folder/of/a/prepared/version`, `wds:/path/{000..999}.tar`,
        `jsonl:/path`, `csv:/path`, `folder:/path`, or `precomputed:/path` (see `precomputed.py`). `tfds:emoji` is the
        data set in this package.
      split: a TFDS split such as "train" or "train[:90%]"; for `folder:` a sub-folder; the others have none.

    Raises:
      UserError: the URI's scheme, a file or a split is not there.
    """
    scheme, colon, path = uri.partition(":")
    if not colon or scheme not in SCHEMES:
        raise UserError(
            f"data source `{uri}` has no known scheme; expected one of {', '.join(s + ':' for s in SCHEMES)}"
        )
    return SCHEMES[scheme](path, split)


def select(source: Source, where: Mapping[str, Iterable[Any]]) -> np.ndarray:
    """Indices of the records whose fields (paths such as "name/en") are all among the values that `where` gives.

    Reads each record once. A record without the field, or that cannot be read, is not selected.
    """
    wanted = {path: {values} if isinstance(values, str) else set(values) for path, values in where.items()}
    source = source.narrow(frozenset(wanted))
    chosen = []
    for i in range(len(source)):
        try:
            record = source[i]
            if all(field(record, path) in values for path, values in wanted.items()):
                chosen.append(i)
        except (BadExample, OSError):
            continue
    return np.asarray(chosen, np.int64)


def _no_split(uri: str, split: str | None) -> None:
    if split is not None:
        raise UserError(f"data source `{uri}` has no splits, got split `{split}`; leave it out")


def _existing(uri: str, path: str) -> Path:
    if not Path(path).exists():
        raise UserError(f"data source `{uri}`: there is no `{path}`")
    return Path(path)


class Tfds(Source):
    """A prepared TFDS data set in ArrayRecord files (or another random-access format), images left encoded."""

    def __init__(self, name: str, split: str | None):
        import tensorflow_datasets as tfds  # imports no TensorFlow; 0.7 s, hence here

        try:
            if name == "emoji":
                builder = tfds.builder_from_directory(str(emoji.PREPARED))
            elif name.startswith(("/", ".", "~")):
                builder = tfds.builder_from_directory(os.path.expanduser(name))
            else:
                builder = tfds.builder(name)
        except ImportError as error:
            raise UserError(
                f"data source `tfds:{name}`: its builder needs {error.name or 'TensorFlow'}, which is not installed; "
                "give the prepared folder instead, `tfds:/.../name/version`"
            ) from None
        except (OSError, tfds.core.registered.DatasetNotFoundError, AssertionError) as error:
            raise UserError(f"data source `tfds:{name}` cannot be opened: {str(error).splitlines()[0]}") from None
        self.name = f"tfds:{name}/{split}"
        if not builder.info.splits:
            raise UserError(f"data source `tfds:{name}` is not prepared in {builder.data_dir}; run `tfds build {name}`")
        base = (split or "").split("[")[0]
        if base not in builder.info.splits and base != "all":
            raise UserError(
                f"data source `tfds:{name}` has no split `{split}`; it has {', '.join(builder.info.splits)}"
            )
        self.features, self.decoders = builder.info.features, {"image": tfds.decode.SkipDecoding()}
        try:
            raw = tfds.decode.DeserializeMethod.RAW_BYTES
            self.source = builder.as_data_source(split, deserialize_method=raw)
        except (OSError, NotImplementedError, ValueError) as error:
            raise UserError(f"data source `{self.name}` cannot be read: {str(error).splitlines()[0]}") from None

    def __len__(self) -> int:
        return len(self.source)

    def narrow(self, paths: frozenset[str]) -> Self:
        narrowed = copy.copy(self)
        narrowed.features = _subset(self.features, paths)
        return narrowed

    def __getitem__(self, i: int) -> dict[str, Any]:
        decoders = self.decoders if "image" in self.features else None
        return _plain(self.features.deserialize_example_np(self.source[i], decoders=decoders))

    def key(self, i: int) -> str:
        return f"{self.name}[{i}]"


def _subset(features: Any, paths: frozenset[str]) -> Any:
    """The TFDS features at some paths of a (nested) FeaturesDict."""
    chosen = {}
    for name, feature in features.items():
        inner = frozenset(p.removeprefix(f"{name}/") for p in paths if p.startswith(f"{name}/"))
        if name in paths:
            chosen[name] = feature
        elif inner and isinstance(feature, type(features)):
            chosen[name] = _subset(feature, inner)
    return type(features)(chosen)


def _plain(value: Any) -> Any:
    """bytes that are text -> str, arrays of texts -> lists, numpy scalars -> Python numbers; images stay bytes."""
    if isinstance(value, dict):
        return {k: v if k == "image" else _plain(v) for k, v in value.items()}
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, np.ndarray) and value.dtype == object:
        return [_plain(v) for v in value.tolist()]
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value


class Table(Source):
    """Rows of a table; a column of image paths (relative to the table's folder) becomes the field "image"."""

    path: Path
    with_image = True

    def row(self, i: int) -> dict[str, Any]:
        raise NotImplementedError

    def narrow(self, paths: frozenset[str]) -> Self:
        return _without_image(self, paths)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = self.row(i)
        for column in PATH_COLUMNS if self.with_image else ():
            name = row.get(column)
            if isinstance(name, str) and name.lower().endswith(IMAGE_SUFFIXES):
                row["image"] = _read(self.path.parent / name)
                break
        return row

    def key(self, i: int) -> str:
        return f"{self.path.name}:{i + 1}"


def _without_image(source: Any, paths: frozenset[str]) -> Any:
    if "image" not in paths:
        source = copy.copy(source)
        source.with_image = False
    return source


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadExample(f"{path}: {error.strerror}") from None


class Jsonl(Table):
    """One JSON object a line; the file is scanned once for line starts, then read by offset."""

    def __init__(self, path: str, split: str | None):
        _no_split(f"jsonl:{path}", split)
        self.path = _existing(f"jsonl:{path}", path)
        starts, lengths, at = [], [], 0
        with open(self.path, "rb") as file:
            for line in file:
                if line.strip():
                    starts.append(at)
                    lengths.append(len(line))
                at += len(line)
        self.starts, self.lengths = np.asarray(starts, np.int64), np.asarray(lengths, np.int64)

    def __len__(self) -> int:
        return len(self.starts)

    def row(self, i: int) -> dict[str, Any]:
        with open(self.path, "rb") as file:
            line = os.pread(file.fileno(), int(self.lengths[i]), int(self.starts[i]))
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BadExample(f"not JSON: {error}") from None
        if not isinstance(row, dict):
            raise BadExample(f"is a JSON {type(row).__name__}, expected an object")
        return row


class Csv(Table):
    """Comma- or tab-separated rows under a header (tab, where the header has one); held in memory."""

    def __init__(self, path: str, split: str | None):
        _no_split(f"csv:{path}", split)
        self.path = _existing(f"csv:{path}", path)
        with open(self.path, newline="", encoding="utf-8-sig") as file:
            header = file.readline()
            file.seek(0)
            self.rows = list(csv.DictReader(file, delimiter="\t" if "\t" in header else ","))

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, i: int) -> dict[str, Any]:
        return {k: v for k, v in self.rows[i].items() if k is not None and v is not None}

    def key(self, i: int) -> str:
        return f"{self.path.name}:{i + 2}"


class Folder(Source):
    """`path[/split]/class/**/picture.jpg`: fields image, label (index of the class in `classes`), text (its name)."""

    with_image = True

    def __init__(self, path: str, split: str | None):
        uri = f"folder:{path}"
        self.root = _existing(uri, os.path.join(path, split) if split else path)
        files = sorted(p for p in self.root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise UserError(f"data source `{uri}` has no pictures ({', '.join(IMAGE_SUFFIXES)}) under `{self.root}`")
        self.files = [str(p.relative_to(self.root)) for p in files]
        self.classes = sorted({f.split(os.sep)[0] for f in self.files if os.sep in f})

    def __len__(self) -> int:
        return len(self.files)

    def narrow(self, paths: frozenset[str]) -> Self:
        return _without_image(self, paths)

    def __getitem__(self, i: int) -> dict[str, Any]:
        name, separator, _ = self.files[i].partition(os.sep)
        record = {"label": self.classes.index(name), "text": name} if separator else {}
        return record | {"image": _read(self.root / self.files[i])} if self.with_image else record

    def key(self, i: int) -> str:
        return self.files[i]


def _wds(path: str, split: str | None) -> Source:
    from vlm_jax.data.wds import Shards

    _no_split(f"wds:{path}", split)
    return Shards(path)


def _precomputed(path: str, split: str | None) -> Source:
    from vlm_jax.data.precomputed import Precomputed

    _no_split(f"precomputed:{path}", split)
    return Precomputed(path)


SCHEMES = {"tfds": Tfds, "wds": _wds, "jsonl": Jsonl, "csv": Csv, "folder": Folder, "precomputed": _precomputed}
