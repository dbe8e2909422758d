"""An index in a store: runs map a copy on disk, which the processes of a host share; `vlm-jax index` writes both."""

import contextlib
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path

from vlm_jax.data import remote, storage
from vlm_jax.data.block_cache import of_user
from vlm_jax.data.confined import digest
from vlm_jax.data.files import MAX_JSON, naming, replacing
from vlm_jax.data.sources.tar_index import DTYPES, NAME
from vlm_jax.errors import DeniedError, StoreError, UserError


def place(folder: str) -> Path:
    """Returns the folder of the copy of an index in a store."""
    return of_user() / "indexes" / digest(folder.rstrip("/").encode())


def fetched(folder: str, given: bool = False) -> str:
    """Copies an index from a store unless the copy is as new; returns the copy's folder, empty if there is no index.

    Args:
      folder: in the store.
      given: the user names it: no access to it is an error. To a folder beside shards, it may mean that there is none.

    Raises:
      UserError: the index in the store is damaged.
      StoreError: the store gives no access or no answer, or the disk of the copy is full.
    """
    to = place(folder)
    with _told(to):
        to.mkdir(parents=True, exist_ok=True)
        with _alone(to):
            try:
                stamp = _stamp(f"{folder}/{NAME}")
            except DeniedError:
                if given:
                    raise
                stamp = None
            if stamp is None:
                (to / NAME).unlink(missing_ok=True)
                return str(to)
            if stamp.size > MAX_JSON:
                raise UserError(f"index `{folder}` has {stamp.size:,} bytes in {NAME}; write it again: vlm-jax index")
            content = remote.fetch(f"{folder}/{NAME}", 0, stamp.size, remote.OPENING)
            if not (to / NAME).is_file() or (to / NAME).read_bytes() != content:
                generation = _generation(folder, content)
                for name in DTYPES:
                    _copy(f"{folder}/{generation}.{name}", to / f"{generation}.{name}")
                with replacing(to / NAME) as out:
                    out.write(content)
                for path in to.iterdir():
                    if path.suffix[1:] in DTYPES and path.stem != generation:
                        path.unlink()
    return str(to)


def _generation(folder: str, content: bytes) -> str:
    with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError):
        generation = json.loads(content)["generation"]
        if isinstance(generation, str) and generation.isalnum():
            return generation
    raise UserError(f"index `{folder}` is damaged; write it again with `vlm-jax index`")


def _copy(url: str, path: Path) -> None:
    stamp = _stamp(url)
    if stamp is None:
        raise UserError(f"index `{url.rpartition('/')[0]}` lacks {path.name}; write it again with `vlm-jax index`")
    with remote.Stream(url) as file, replacing(path) as out:
        for start in range(0, stamp.size, remote.STREAMED):
            out.write(file.read(start, remote.STREAMED))


def check_writable(folder: str) -> None:
    """Raises UserError if nothing can be written into a folder of a store."""
    if folder.startswith(("http://", "https://")):
        raise UserError(
            f"index `{folder}` is on a web server, where nothing can be written; name a folder by --out=DIR, and end "
            "the URI of runs with ?index=DIR"
        )
    try:
        remote.put(f"{folder}/writing", b"")
        remote.remove(f"{folder}/writing")
    except (StoreError, FileNotFoundError) as error:
        raise UserError(f"index `{folder}` cannot be written: {error}; name another folder by --out=DIR") from None


def publish(folder: str) -> None:
    """Copies the index from its place on disk into the store, index.json last, and removes the columns before."""
    own = place(folder)
    generation = _generation(folder, (own / NAME).read_bytes())
    for name in DTYPES:
        remote.put_file(own / f"{generation}.{name}", f"{folder}/{generation}.{name}")
    before = None
    if (stamp := _stamp(f"{folder}/{NAME}")) is not None:
        with contextlib.suppress(UserError):
            before = _generation(folder, remote.fetch(f"{folder}/{NAME}", 0, stamp.size))
    remote.put(f"{folder}/{NAME}", (own / NAME).read_bytes())
    if before not in (None, generation):
        for name in DTYPES:
            with contextlib.suppress(FileNotFoundError):
                remote.remove(f"{folder}/{before}.{name}")


def _stamp(url: str) -> storage.Stamp | None:
    try:
        return storage.stamp_of(url)
    except OSError:
        return None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the copy, so that one process of the host makes it."""
    with open(folder / "copying", "ab") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        with naming(folder):
            yield
    except OSError as error:
        raise StoreError(
            f"the copy of the index, `{folder}`, cannot be written ({error.strerror}); free space there, or set "
            "XDG_CACHE_HOME to another folder"
        ) from None
