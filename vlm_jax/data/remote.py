"""Requests to stores and web servers, by fsspec: time-outs, more tries, and what their errors mean.

A request that fails is made again, with growing pauses. A lost connection is waited for and counted; an example is
never skipped because of it. An answer of another length than asked for counts as a failure.
"""

import asyncio
import collections
import concurrent.futures
import errno
import functools
import hashlib
import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, TypeVar

from vlm_jax.data.stamp import URL, Stamp
from vlm_jax.errors import CUT, DeniedError, StoreError, UserError, near

log = logging.getLogger(__name__)
SCHEMES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp", "memory": "fsspec"}
PATIENCE, OPENING = 3600.0, 60.0  # seconds that an answer is waited for: within a run, and when a run starts
TIMEOUT, SLOWEST = 30.0, 2**17  # seconds of a request, and bytes a second beside
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds
SAID = 10.0  # seconds between two lines of the log
WRONG = 10  # answers of a wrong length, one after the other, are no accident
AT_ONCE = 16  # requests
STREAMED = 2**23  # bytes of a request of a file that is read from front to back
LISTED = 32  # files of one folder are found by a listing, fewer one by one
VERSIONS = ("ETag", "etag", "generation", "md5Hash", "Last-Modified", "LastModified", "updated", "created", "mtime")
T = TypeVar("T")


class WrongLengthError(OSError):
    """A body is cut short or longer than asked for."""


class Counts:
    """Requests that were made again, and seconds waited for them, of this process since the last `take`."""

    def __init__(self):
        self._lock, self._counts = threading.Lock(), collections.Counter()
        self._said = -SAID

    def add(self, **counts: float) -> None:
        with self._lock:
            self._counts.update(counts)

    def take(self) -> dict[str, float]:
        with self._lock:
            taken, self._counts = dict(self._counts), collections.Counter()
        return taken

    def may_say(self) -> bool:
        """Whether `SAID` seconds have passed since it last returned True."""
        with self._lock:
            now = time.monotonic()
            if due := now - self._said >= SAID:
                self._said = now
        return due


counts = Counts()


@functools.cache
def filesystem(scheme: str, path: str) -> Any:
    """Returns fsspec's file system of a URL's scheme."""
    if scheme not in SCHEMES:
        hint = near(scheme, SCHEMES, f"expected one of {', '.join(f'{known}://' for known in SCHEMES)}, file://")
        raise UserError(f"`{path}` is in no known store; {hint}")
    try:
        import fsspec

        options = {} if scheme == "memory" else {"use_listings_cache": False}
        if scheme == "s3":  # all tries are made and counted here
            own = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
            options["config_kwargs"] = {"retries": {"max_attempts": 0}, "max_pool_connections": 4 * AT_ONCE} | own
        found = fsspec.filesystem(scheme, **options)
    except ImportError:
        raise UserError(
            f"`{path}` needs the package {SCHEMES[scheme]}; install it by: pip install 'vlm_jax[remote]'"
        ) from None
    if scheme == "s3":
        found.retries = 1
    return found


def _of(path: str) -> Any:
    scheme = URL.match(path)[1]
    return filesystem(scheme, f"{scheme}://")


def _ask(fs: Any, timeout: float, name: str, *args: Any, **options: Any) -> Any:
    """Calls a method of a file system, its coroutine `_name` within `timeout` seconds where it has one."""
    if not fs.async_impl:
        return getattr(fs, name)(*args, **options)
    return _wait(fs, timeout, getattr(fs, f"_{name}"), *args, **options)


def _wait(fs: Any, timeout: float, coroutine: Callable, *args: Any, **options: Any) -> Any:
    from fsspec.asyn import sync

    return sync(fs.loop, coroutine, *args, timeout=timeout, **options)


def answer(path: str, ask: Callable[[], T], patience: float | None) -> T:
    """Returns what `ask` returns, once it does; waits for `patience` seconds, None for `PATIENCE`.

    Raises:
      FileNotFoundError: there is no such file.
      StoreError: access is denied, the request is wrong, or there was no answer within `patience` seconds.
    """
    patience = PATIENCE if patience is None else patience
    begin, failed, wrong = time.monotonic(), 0, 0
    while True:
        try:
            found = ask()
            break
        except (FileNotFoundError, UserError):
            raise
        except Exception as error:  # of three clients, dozens of types
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:CUT]
            if _is_denied(error):
                raise DeniedError(
                    f"`{path}` gives no access, or is not there: set the credentials that s3fs, gcsfs or aiohttp "
                    f"read; of a public bucket, FSSPEC_S3_ANON=1 or FSSPEC_GS_TOKEN=anon ({reason})"
                ) from None
            if _is_refused(error):
                raise StoreError(f"`{path}` is refused: check the URL and the store's settings ({reason})") from None
            failed, waited = failed + 1, time.monotonic() - begin
            counts.add(repeated_requests=1)
            wrong = wrong + 1 if isinstance(error, WrongLengthError) else 0
            if waited >= patience or wrong >= WRONG:
                raise StoreError(
                    f"`{path}` has given no usable answer in {failed} requests and {waited:.0f} s ({reason}); check "
                    "the network and the store; the same command continues"
                ) from None
            if waited >= SAID and counts.may_say():
                log.warning("%s: no answer for %.0f s, %d requests (%s); waiting", path, waited, failed, reason)
            pause = min(FIRST_PAUSE * 2 ** min(failed - 1, 20), LONGEST_PAUSE) * random.uniform(0.5, 1)
            time.sleep(min(pause, max(begin + patience - time.monotonic(), 0)))
    if failed:
        waited = time.monotonic() - begin
        counts.add(waited_seconds=waited)
        if waited >= SAID:
            log.warning("%s: answers again, after %.0f s and %d requests", path, waited, failed)
    return found


def _status(error: Exception) -> int:
    found = getattr(error, "status" if hasattr(error, "status") else "code", None)  # aiohttp's; gcsfs'
    return int(found) if str(found).isdecimal() else 0


def _is_denied(error: Exception) -> bool:
    named = "Credential" in type(error).__name__ or "Forbidden" in str(error)
    return isinstance(error, PermissionError) or named or _status(error) in (401, 403)


def _is_refused(error: Exception) -> bool:
    """Returns whether no other try mends an error."""
    name = type(error).__name__
    wrong = isinstance(error, ValueError) and not isinstance(error, UnicodeError | json.JSONDecodeError)
    wrong |= "Validation" in name or name in ("NoRegionError", "ProfileNotFound")
    wrong |= getattr(error, "errno", None) in (errno.EINVAL, errno.EISDIR, errno.ENOTDIR)
    return wrong or (400 <= _status(error) < 500 and _status(error) not in (408, 416, 425, 429))


def stamp_of(path: str, patience: float | None = None) -> Stamp:
    """Returns the stamp of a file; raises FileNotFoundError if there is none, StoreError as `answer` does."""
    fs = _of(path)
    if _is_http(path):
        return _stamp(path, answer(path, lambda: _wait(fs, TIMEOUT, _http_info, fs, path), patience))
    return _stamp(path, answer(path, lambda: _ask(fs, TIMEOUT, "info", fs._strip_protocol(path)), patience))


def stamps_of(paths: Sequence[str]) -> list[Stamp | None]:
    """Returns the stamps of files in one store, None where there is no file."""
    fs, found = _of(paths[0]), {}
    folders = collections.Counter(path.rpartition("/")[0] for path in paths)
    for folder, count in folders.items():
        if count >= LISTED and not _is_http(folder):
            try:
                own = fs._strip_protocol(folder)
                listing = answer(folder, lambda own=own: _ask(fs, 10 * TIMEOUT, "ls", own, detail=True), OPENING)
            except FileNotFoundError:
                listing = []
            files = {fs._strip_protocol(info["name"]): info for info in listing if info.get("type") != "directory"}
            own = [path for path in paths if path.rpartition("/")[0] == folder]
            found |= {path: files.get(fs._strip_protocol(path)) for path in own}
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as threads:
        others = [path for path in dict.fromkeys(paths) if path not in found]
        stamps = dict(zip(others, threads.map(_stamp_or_none, others), strict=True))
    return [stamps[path] if path in stamps else found[path] and _stamp(path, found[path]) for path in paths]


def _stamp_or_none(path: str) -> Stamp | None:
    try:
        return stamp_of(path, OPENING)
    except OSError:
        return None


def _stamp(path: str, info: Mapping[str, Any]) -> Stamp:
    if info.get("type") == "directory":
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    if info.get("size") is None:
        raise StoreError(f"`{path}` does not say its size; copy it to another server or to disk")
    version = next((str(info[name]) for name in VERSIONS if info.get(name)), "").strip('"')
    hashed = hashlib.blake2b(version.encode(), digest_size=8).digest()
    return Stamp(int(info["size"]), int.from_bytes(hashed, "little") >> 4)  # as a time in ns, any disk can hold it


def glob(pattern: str) -> list[str]:
    """Returns the URLs that match wildcards, sorted."""
    fs, scheme = _of(pattern), URL.match(pattern)[1]
    found = answer(pattern, lambda: _ask(fs, 10 * TIMEOUT, "glob", fs._strip_protocol(pattern)), OPENING)
    names = (fs._strip_protocol(name) for name in found)
    return sorted(name if URL.match(name) else f"{scheme}://{name.lstrip('/')}" for name in names)


def fetch(path: str, start: int, length: int, patience: float | None = None) -> bytes:
    """Returns `length` bytes of a file that has as many; raises as `stamp_of` does."""
    if not length:
        return b""
    fs, timeout = _of(path), TIMEOUT + length / SLOWEST

    def ask() -> bytes:
        if _is_http(path):
            return _wait(fs, timeout, _http_range, fs, path, start, length)
        data = _ask(fs, timeout, "cat_file", fs._strip_protocol(path), start=start, end=start + length)
        if len(data) != length:
            raise WrongLengthError(f"{len(data)} bytes, expected {length}")
        return data

    return answer(path, ask, patience)


def put(path: str, data: bytes) -> None:
    """Writes a file."""
    fs = _of(path)
    answer(path, lambda: _ask(fs, TIMEOUT + len(data) / SLOWEST, "pipe_file", fs._strip_protocol(path), data), OPENING)


def put_file(source: os.PathLike, path: str) -> None:
    """Copies a file from the disk."""
    fs, timeout = _of(path), TIMEOUT + os.path.getsize(source) / SLOWEST
    answer(path, lambda: _ask(fs, timeout, "put_file", os.fspath(source), fs._strip_protocol(path)), None)


def remove(path: str) -> None:
    """Removes a file."""
    fs = _of(path)
    answer(path, lambda: _ask(fs, TIMEOUT, "rm_file", fs._strip_protocol(path)), OPENING)


def _is_http(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def _http(fs: Any, session: Any, path: str, first: int, last: int) -> Any:
    """Asks for the bytes `first` to `last`. fsspec's own methods take a server's failure for a missing file."""
    options = dict(fs.kwargs)
    headers = {**options.pop("headers", {}), "Range": f"bytes={first}-{last}", "Accept-Encoding": "identity"}
    return session.get(fs.encode_url(path), headers=headers, **options)


def _check_ranges(path: str, response: Any) -> None:
    if response.status in (404, 410):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    if response.status != 416:
        response.raise_for_status()
    if response.status == 200:
        raise StoreError(f"`{path}`: the server gives only whole files; use one that serves ranges, or copy to disk")


async def _http_info(fs: Any, path: str) -> dict[str, Any]:
    async with _http(fs, await fs.set_session(), path, 0, 0) as response:  # HEAD fails where a URL is signed for GET
        if response.status == 200 and response.headers.get("Content-Length") == "0":
            return {"size": 0, **response.headers}
        _check_ranges(path, response)
        _, _, total = response.headers.get("Content-Range", "").rpartition("/")
        if not total:
            raise WrongLengthError("a range of no size")
        return {"size": total if total.isdecimal() else None, **response.headers}


async def _http_range(fs: Any, path: str, start: int, length: int) -> bytes:
    async with _http(fs, await fs.set_session(), path, start, start + length - 1) as response:
        _check_ranges(path, response)
        came = response.headers.get("Content-Range", "").partition("/")[0]
        if came != f"bytes {start}-{start + length - 1}":
            raise WrongLengthError(f"{came or 'no range'}, expected bytes {start}-{start + length - 1}")
        try:
            data = await response.content.readexactly(length)
        except asyncio.IncompleteReadError as error:
            raise WrongLengthError(f"{len(error.partial)} bytes, expected {length}") from None
        if await response.content.read(1):
            raise WrongLengthError(f"more bytes than {length}")
        return data


class Stream:
    """A file that is read from front to back: whole blocks, the next one ahead, in memory."""

    def __init__(self, path: str):
        self._path, self._stamp, self._blocks = path, stamp_of(path, OPENING), {}

    def __enter__(self) -> Self:
        self._threads = concurrent.futures.ThreadPoolExecutor(1)
        return self

    def __exit__(self, *_) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._blocks = {}

    @property
    def stamp(self) -> Stamp:
        return self._stamp

    def read(self, start: int, length: int) -> bytes:
        """Returns the bytes from `start`: `length`, or fewer if the file ends before."""
        end = min(start + length, self._stamp.size)
        if start >= end:
            return b""
        numbers = range(start // STREAMED, (end - 1) // STREAMED + 1)
        data = b"".join(self._block(number) for number in numbers) if len(numbers) > 1 else self._block(numbers[0])
        first = numbers[0] * STREAMED
        return data[start - first : end - first]

    def _block(self, number: int) -> bytes:
        wanted = [n for n in (number, number + 1) if n * STREAMED < self._stamp.size]
        for n in wanted:
            if n not in self._blocks:
                size = min(STREAMED, self._stamp.size - n * STREAMED)
                self._blocks[n] = self._threads.submit(fetch, self._path, n * STREAMED, size)
        data = self._blocks[number].result()
        self._blocks = {n: block for n, block in self._blocks.items() if n >= number}
        return data
