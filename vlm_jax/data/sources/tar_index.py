"""The index of tar shards on disk: the columns of `tar_columns`, written once and mapped by every run.

A folder holds index.json (names of shards and extensions, the generation), one file for each column of that generation,
and, while it is written, a file for each finished shard in `parts`. A new index replaces index.json last, so a kill
leaves the old one or the new one.
"""

import concurrent.futures
import contextlib
import io
import itertools
import json
import mmap
import multiprocessing
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.data import worker
from vlm_jax.data.confined import digest
from vlm_jax.data.files import naming, read_json, replacing, write_json
from vlm_jax.data.sources import tar_columns
from vlm_jax.data.sources.tar_columns import SHARD, Columns
from vlm_jax.data.storage import Stamp, stamps_of
from vlm_jax.errors import StoreError, UserError, mendable

FOLDER = ".wds_index"  # beside the shards
NAME = "index.json"
PARTS = "parts"
VERSION = 1
DTYPES = {"shards": SHARD, "bounds": np.dtype("<u4"), "members": np.dtype("<u4"), "keys": np.dtype("u1")}


class Index(NamedTuple):
    """An index that is open.

    Attributes:
      generation: changes when the index is written anew.
      numbers: name of a shard -> its row of `columns.shards`.
      broken: name of a shard that cannot be read -> why.
      columns: mapped from disk.
      maps: what holds the columns, see `release`.
    """

    generation: str
    numbers: Mapping[str, int]
    broken: Mapping[str, str]
    columns: Columns
    maps: Sequence[mmap.mmap]


def read(folder: str | os.PathLike, generation: str | None = None) -> Index | None:
    """Opens an index; None if the folder has none.

    Args:
      folder: the index's.
      generation: the expected one; None for any.

    Raises:
      UserError: the index is damaged, of another version, or of another generation.
    """
    folder = Path(folder)
    if not os.path.isfile(folder / NAME) and generation is None:  # False also for a name that no system takes
        return None
    kept = read_json(folder / NAME)
    if kept.get("version") != VERSION:
        raise _damaged(folder, f"is of version {kept.get('version')!r:.20}, expected {VERSION}")
    if generation not in (None, kept.get("generation")):
        raise UserError(f"index `{folder}` has been written anew since it was opened; start again")
    names, extensions, broken = (kept.get(key) for key in ("shards", "extensions", "broken"))
    sound = isinstance(names, list) and isinstance(extensions, list) and isinstance(broken, dict)
    texts = [kept.get("generation"), *names, *extensions, *broken.values()] if sound else [None]
    if not all(isinstance(text, str) for text in texts) or not kept["generation"].isalnum():
        raise _damaged(folder, f"has no names in {NAME}")
    columns = {name: _mapped(folder / f"{kept['generation']}.{name}", dtype) for name, dtype in DTYPES.items()}
    shards = np.array(columns["shards"])
    counts = [shards[name] for name in ("records", "members", "key_bytes", "size", "no_record", "others")]
    whole = [sum(count.tolist()) for count in counts]
    lengths = [3 * (whole[0] + len(shards)), 3 * whole[1], whole[2]]
    if len(names) != len(shards) or lengths != [len(columns[name]) for name in ("bounds", "members", "keys")]:
        raise _damaged(folder, "has columns of other lengths than its shards have together")
    if any((count < 0).any() for count in counts):
        raise _damaged(folder, "has numbers below 0")
    pairs = columns["bounds"].reshape(-1, 3), columns["members"].reshape(-1, 3)
    numbers = {name: number for number, name in enumerate(names)}
    maps = [array.base.obj for array in columns.values() if array.base is not None]
    return Index(kept["generation"], numbers, broken, Columns(shards, *pairs, columns["keys"], extensions), maps)


def release(maps: Iterable[mmap.mmap]) -> None:
    """Gives back the pages of maps that were read, to the disk's cache: they would add up to the whole index."""
    for one in maps:
        if hasattr(mmap, "MADV_DONTNEED"):
            one.madvise(mmap.MADV_DONTNEED)


def _damaged(folder: Path, what: str) -> UserError:
    return UserError(f"index `{folder}` {what}; write it again with `vlm-jax index`")


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    """Returns the numbers of a file, mapped: pages are read when they are used."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size % dtype.itemsize:
                raise _damaged(path.parent, f"has a cut file, {path.name}")
            if not size:
                return np.zeros(0, dtype)
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise _damaged(path.parent, f"lacks {path.name} ({error.strerror})") from None
    if hasattr(mmap, "MADV_RANDOM"):
        content.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(content, dtype)


def build(
    base: str,
    names: Sequence[str],
    folder: str | os.PathLike,
    workers: int = 1,
    progress: Callable[[int], Any] = lambda count: None,
) -> Index:
    """Writes the index of some shards, or what is missing in it.

    A shard whose size and modification time are those in the index, or in the parts of a run that was killed, is not
    read again. Other shards of the index stay if they are unchanged.

    Args:
      base: what stands before the names, for their paths.
      names: of the shards, in the index.
      folder: the index's.
      workers: processes that read shards; 1 reads them in this process.
      progress: called with the number of shards that are done since the last call.
    """
    folder, old = Path(folder), None
    with contextlib.suppress(UserError):  # a damaged one is written anew
        old = read(folder)
    numbers, broken = ({}, {}) if old is None else (old.numbers, dict(old.broken))
    stamps = dict(
        zip(found := [*{**numbers, **dict.fromkeys(names)}], stamps_of(base + name for name in found), strict=True)
    )
    kept = {name for name, i in numbers.items() if stamps[name] == _stamp(old.columns.shards[i])}
    todo = {name: folder / PARTS / f"{digest(os.fsencode(name))}.npz" for name in names if name not in kept}
    (folder / PARTS).mkdir(parents=True, exist_ok=True)
    missing = [name for name, part in todo.items() if stamps[name] != _part_stamp(part)]
    progress(len(names) - len(missing))
    broken = {name: mistake for name, mistake in broken.items() if name not in todo}
    with processes(min(workers, len(missing))) as each:
        mistakes = each(write_part, [base + name for name in missing], [todo[name] for name in missing])
        for name, mistake in zip(missing, mistakes, strict=True):
            progress(1)
            if mistake:
                broken[name] = mistake
    parts = {name: part for name, part in todo.items() if name not in broken}
    if old is None or parts or len(kept) < len(numbers) or broken != old.broken:
        merge(folder, old, [name for name in numbers if name in kept], parts, broken)
    shutil.rmtree(folder / PARTS)
    return read(folder)


def _stamp(row: np.void) -> Stamp:
    return Stamp(int(row["size"]), int(row["version"]))


@contextlib.contextmanager
def processes(workers: int) -> Iterator[Callable]:
    """Yields a `map` over so many processes, in order; one worker is this process."""
    if workers <= 1:
        yield map
        return
    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, spawn, worker.begin)

    def each(*arguments):
        with worker.main_module_hidden():
            return pool.map(*arguments)

    try:
        yield each
    finally:
        pool.shutdown(cancel_futures=True)


def write_part(path: str, part: Path) -> str | None:
    """Writes a shard's columns; returns why they cannot be read, None if they can."""
    try:
        columns = tar_columns.read_shard(path)
    except StoreError:
        raise
    except (UserError, OSError) as error:
        return mendable(error) or f"shard `{path}` cannot be read: {error.strerror}"
    extensions = np.frombuffer(json.dumps(columns.extensions).encode(), np.uint8)
    content = io.BytesIO()
    np.savez(content, **columns._replace(extensions=extensions)._asdict())
    temporary = part.with_suffix(".tmp")
    with naming(part):  # not synced: a part that a power cut damages is written again
        temporary.write_bytes(content.getvalue())
        temporary.replace(part)
    return None


def _part(path: Path) -> Columns:
    with np.load(path, allow_pickle=False) as file:
        columns = Columns(**file)
    return columns._replace(extensions=json.loads(columns.extensions.tobytes()))


def _part_stamp(path: Path) -> Stamp | None:
    """Returns the stamp of the shard of a part, None if the part is damaged or absent."""
    try:
        return _stamp(_part(path).shards[0])
    except Exception:  # of damaged files, dozens of types
        return None


def merge(
    folder: Path, old: Index | None, kept: Sequence[str], parts: Mapping[str, Path], broken: Mapping[str, str]
) -> None:
    """Writes columns of a new generation from those of the old one and of parts, and makes it the index."""
    generation, numbers = secrets.token_hex(4), {}
    with contextlib.ExitStack() as files:
        out = {name: files.enter_context(replacing(folder / f"{generation}.{name}")) for name in DTYPES}
        for columns in itertools.chain(_of(old, kept), map(_part, parts.values())):
            columns = columns._replace(members=tar_columns.numbered(columns, numbers))
            for name, file in out.items():
                file.write(getattr(columns, name).astype(DTYPES[name], copy=False).tobytes())
    index = dict(version=VERSION, generation=generation, shards=[*kept, *parts], extensions=list(numbers))
    write_json(folder / NAME, index | {"broken": broken})
    for path in folder.iterdir():
        if path.suffix[1:] in DTYPES and path.stem != generation:
            path.unlink()


def _of(index: Index | None, names: Iterable[str]) -> Iterator[Columns]:
    if index is not None:
        first = tar_columns.starts(index.columns.shards)
        for name in names:
            yield tar_columns.shard(index.columns, index.numbers[name], first)
