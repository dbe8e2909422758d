"""Tensors that stay in the file until read, and files that are safe to open."""

import contextlib
import dataclasses
import errno
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vlm_jax.errors import UserError

_BUFFER = 8 << 20  # bytes read at once where a part of a tensor is not contiguous in the file
_GAP = 16 << 10  # bytes between two rows up to which reading over them is cheaper than another system call
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An array that is read on demand.

    Attributes:
      shape: its shape.
      dtype: its numpy dtype (of ml_dtypes where the file has bfloat16 or float8), in this machine's byte order.
      load: one slice per axis, as (start, stop, step > 0) -> the array of that part, in memory of its own.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[tuple[slice, ...]], np.ndarray] = dataclasses.field(repr=False)

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Returns a fresh, writable, C-contiguous array of `self[index]`; axes without a slice are whole.

        Raises:
          ValueError: index has more slices than axes, or a negative step.
          UserError: the file cannot be read, or was changed since it was opened.
        """
        if len(index) > len(self.shape) or any(part.step is not None and part.step < 1 for part in index):
            raise ValueError(
                f"index {index} of a tensor {self.shape}: expected a slice per axis, with steps of 1 or more"
            )
        index = (*index, *(slice(None),) * (len(self.shape) - len(index)))
        parts = tuple(slice(*part.indices(size)) for part, size in zip(index, self.shape, strict=True))
        array = self.load(parts)
        return np.array(array, self.dtype, order="C", copy=None if array.flags.writeable else True)


# The input of writers: an array, a `Tensor`, or a callable without arguments that has `shape` and `dtype`.
Array = np.ndarray | Tensor | Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """The tensors of one file, or of the shards of one index.

    Attributes:
      path: the file (or the index).
      kind: "safetensors", "npz", "torch", "torchscript" or "torch_legacy".
      tensors: by name, in the file's order.
      metadata: `__metadata__` of safetensors; numbers, strings and flags by dotted name of a torch file.
      averages: names of averaged weights that a torch file holds besides `tensors`, or that were chosen.
    """

    path: Path
    kind: str
    tensors: Mapping[str, Tensor]
    metadata: dict[str, Any]
    averages: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class RegularFile:
    """A regular file (or symbolic links to one), opened anew for every read; `size` in bytes."""

    path: Path
    size: int
    stamp: tuple[int, ...] = dataclasses.field(repr=False)

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Opens the file, unbuffered; raises a UserError if the file has changed since `regular_file`."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}") from error
        with open(descriptor, "rb", buffering=0) as handle:
            if _stamp(os.fstat(descriptor)) != self.stamp:
                raise UserError(f"{self.path} was changed while it was being read; open it again")
            yield handle

    def read(self, offset: int, size: int) -> bytes:
        """Returns `size` bytes, or fewer at the end of the file."""
        buffer = bytearray(max(0, min(size, self.size - offset)))
        with self.open() as handle:
            _read_into(self.path, handle, offset, buffer)
        return bytes(buffer)


def regular_file(path: str | os.PathLike) -> RegularFile:
    """Returns the regular file at `path`; raises a UserError for anything else, which is never opened."""
    path = Path(path).absolute()
    try:
        info = os.stat(path)
    except ValueError as error:  # NUL, surrogates
        raise UserError(f"{str(path)!r:.300} is no path of a file ({error_text(error)})") from None
    except OSError as error:
        reasons = {
            errno.ENOENT: "a symbolic link to a file that is not there" if os.path.islink(path) else "not there",
            errno.ELOOP: "a symbolic link in a loop",
        }
        reason = reasons.get(error.errno, f"not readable ({error.strerror})")
        raise UserError(
            f"{str(path)[:1000]} is {reason}; expected a file of tensors; download it again or mend the path"
        ) from error
    if not stat.S_ISREG(info.st_mode):
        kind = _KINDS.get(stat.S_IFMT(info.st_mode), "no regular file")
        raise UserError(f"{path} is {kind}; expected a file of tensors")
    return RegularFile(path, info.st_size, _stamp(info))


def stored_tensor(
    file: RegularFile,
    name: str,
    dtype: np.dtype,
    shape: Sequence[int],
    offset: int,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Returns a tensor whose elements lie uncompressed in a file.

    Args:
      file: the file.
      name: for errors.
      dtype: as in the file.
      shape: of the whole tensor.
      offset: byte of its first element.
      strides: bytes from one element to the next along each axis, 0 or more; None is C order.

    Raises:
      UserError: the tensor lies outside the file, or needs more memory than the file has bytes.
    """
    shape = tuple(shape)
    check_shape(file.path, name, shape, dtype)
    strides = tuple(strides) if strides is not None else c_strides(shape, dtype.itemsize)
    end = offset + _span(shape, strides, dtype.itemsize) if math.prod(shape) else offset
    if offset < 0 or end > file.size:
        raise UserError(
            f"{file.path}: tensor `{name}` ends at byte {end:,}, the file at byte {file.size:,}; "
            "it is truncated or damaged, download it again"
        )
    if math.prod(shape) * dtype.itemsize > file.size:
        raise UserError(f"{file.path}: tensor `{name}` {dtype}{list(shape)} is larger than its file")

    def load(index: tuple[slice, ...]) -> np.ndarray:
        out = np.empty([len(range(part.start, part.stop, part.step)) for part in index], dtype)
        if out.size:
            start = offset + sum(part.start * stride for part, stride in zip(index, strides, strict=True))
            steps = [part.step * stride for part, stride in zip(index, strides, strict=True)]
            axes = sorted((axis for axis, size in enumerate(out.shape) if size > 1), key=lambda axis: -steps[axis])
            ones = [axis for axis, size in enumerate(out.shape) if size == 1]
            with file.open() as handle:
                # In storage order, the widest step first, so that the file is read forwards.
                view = out.transpose(*axes, *ones)[(..., *[0] * len(ones))]
                _fill(partial(_read_into, file.path, handle), view, start, [steps[axis] for axis in axes])
        return out

    return Tensor(shape, dtype.newbyteorder("="), load)


def check_shape(path: Path, name: str, shape: Sequence[Any], dtype: np.dtype) -> None:
    """Raises a UserError unless a numpy array can have `shape`, non-negative integers."""
    if not all(type(size) is int and size >= 0 for size in shape):
        raise UserError(f"{path}: tensor `{name}` has shape {str(list(shape))[:80]}; expected integers of 0 or more")
    if len(shape) > 32 or math.prod(max(size, 1) for size in shape) * dtype.itemsize >= 1 << 62:
        raise UserError(
            f"{path}: tensor `{name}` has a shape of {len(shape)} axes that no array can have; it is damaged"
        )


def c_strides(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Returns strides in C order, multiples of `itemsize`; axes of size 0 count as size 1."""
    return tuple(itemsize * math.prod(max(size, 1) for size in shape[axis + 1 :]) for axis in range(len(shape)))


def produce(name: str, array: Array) -> np.ndarray:
    """Returns the array, little-endian, C-contiguous; raises ValueError unless shape and dtype are as declared."""
    value = np.asarray(array.read() if isinstance(array, Tensor) else array() if callable(array) else array)
    if value.shape != tuple(array.shape) or value.dtype != array.dtype:
        raise ValueError(f"`{name}` came as {value.dtype}{value.shape}; expected {array.dtype}{tuple(array.shape)}")
    return np.require(value, value.dtype.newbyteorder("<"), "C")


def array_bytes(array: np.ndarray) -> np.ndarray:
    """Returns a C-contiguous array's bytes as a view, uint8 [n]."""
    return array.reshape(-1).view(np.uint8)


def error_text(error: BaseException) -> str:
    """Returns the first line of an error, shortened for use in another error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _fill(read_into: Callable, out: np.ndarray, offset: int, strides: Sequence[int]) -> None:
    """Reads elements `strides` bytes apart (widest first, no axis of size 1) into the view `out`."""
    if out.flags.c_contiguous and tuple(strides) == out.strides:
        return read_into(offset, array_bytes(out))
    row = _span(out.shape[1:], strides[1:], out.itemsize)
    gaps = [strides[axis] - _span(out.shape[axis + 1 :], strides[axis + 1 :], out.itemsize) for axis in range(out.ndim)]
    if row > _BUFFER or max(gaps) > _GAP:
        for i in range(len(out)):
            _fill(read_into, out[i, ...], offset + i * strides[0], strides[1:])
        return None
    rows = max(1, _BUFFER // strides[0]) if strides[0] else len(out)
    for start in range(0, len(out), rows):
        part = out[start : start + rows]
        buffer = bytearray((len(part) - 1) * strides[0] + row)
        read_into(offset + start * strides[0], buffer)
        part[...] = np.ndarray(part.shape, out.dtype, buffer, strides=strides)
    return None


def _span(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> int:
    """Bytes from the first element to the end of the last."""
    return itemsize + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _read_into(path: Path, handle: BinaryIO, offset: int, buffer: np.ndarray | bytearray) -> None:
    view, done = memoryview(buffer), 0
    try:
        handle.seek(offset)
        while done < len(view):
            count = handle.readinto(view[done:])
            if not count:
                raise UserError(f"{path} ended early, at byte {offset + done:,}; it is truncated, download it again")
            done += count
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _stamp(info: os.stat_result) -> tuple[int, ...]:
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns
