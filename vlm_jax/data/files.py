"""Files that are written whole or not at all, and JSON files that are read with a size limit."""

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from vlm_jax.errors import UserError

MAX_JSON = 256 << 20  # bytes


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Gives an error of the operating system this path if the error names no file: a full disk names none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Yields a file to write, which replaces `path` once complete and on disk; a failure leaves nothing behind."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path), open(temporary, "wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Puts new names in a folder on disk, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def inside(folder: Path, name: str) -> Path:
    """Returns the path of a file in a folder, by a name that the folder's own files give.

    Raises:
      UserError: the name or a symbolic link leads out of the folder; the cache of the Hugging Face hub is no way out.
    """
    path = Path(folder, name)
    if "\0" in name or os.path.isabs(name) or ".." in Path(name).parts:
        raise UserError(f"{folder} names the file {name[:200]!r}; expected one in this folder")
    root, real = folder.resolve(), path.resolve()
    cache = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not (real.is_relative_to(root) or real.is_relative_to(cache)):
        raise UserError(f"{path} is a link to {real}, outside of the folder; expected a file in it")
    return path


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes JSON: a reader, a kill or a power cut sees the old file or the new file, never a part."""
    text = json.dumps(value, indent=2) + "\n"
    with replacing(path) as out:
        out.write(text.encode())


def read_json(path: Path, kind: type = dict) -> Any:
    """Returns the dict (or list) in a JSON file; an empty one if there is no file.

    Raises:
      UserError: the file is not JSON, or holds another type.
    """
    if not path.is_file():
        return kind()
    if path.stat().st_size > MAX_JSON:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes; expected JSON of at most {MAX_JSON:,}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, kind):
        should = "object" if kind is dict else "array"
        raise UserError(
            f"{path} holds a {type(value).__name__}; expected a {kind.__name__}: it should hold a JSON {should}"
        )
    return value


def read_kept(path: Path) -> dict[str, Any] | None:
    """Returns the object that a run keeps in a JSON file; None if there is no file, or the file is damaged (logged)."""
    try:
        return read_json(path) if path.is_file() else None
    except UserError as error:
        logging.warning("%s; it is left out and written anew", error)
        return None


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the lines of a metrics file, {"step": n, name: number, ...}; logs how many damaged lines it leaves out.

    A kill cuts the last line short; a power cut may leave anything at the end.
    """
    lines, path = [], Path(path)
    found = path.read_bytes().splitlines() if path.is_file() else []
    for line in found:
        with contextlib.suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if (
                isinstance(entry, dict)
                and "step" in entry
                and all(map(_is_number, entry.values()))
                and "".join(entry).isprintable()
            ):
                lines.append(entry)
    if len(lines) < len(found):
        logging.warning("%s: %d damaged lines of %d are left out", path, len(found) - len(lines), len(found))
    return lines
