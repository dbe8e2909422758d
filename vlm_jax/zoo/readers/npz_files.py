"""npz files of numpy and big_vision: a zip archive of .npy arrays (numpy.lib.format)."""

import math
import os
import re
import struct
import zipfile
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from vlm_jax.data.files import replacing
from vlm_jax.errors import UserError
from vlm_jax.zoo.readers.stored import (
    Array,
    RegularFile,
    Tensor,
    TensorFile,
    array_bytes,
    c_strides,
    check_shape,
    produce,
    stored_tensor,
)
from vlm_jax.zoo.readers.zip_members import Member

_MAX_HEADER = 10_000  # characters, numpy's own limit
_CHUNK = 16 << 20  # bytes handed to zipfile at once
_HEADER = re.compile(
    r"\{\s*'descr':\s*(?P<descr>.+?),\s*'fortran_order':\s*(?P<fortran_order>True|False),"
    r"\s*'shape':\s*\((?P<shape>[\dL,\s]*)\),?\s*\}\s*"
)
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def open_npz(file: RegularFile, members: Mapping[str, Member]) -> TensorFile:
    """Reads the arrays' headers; raises a UserError for damage, odd compression or arrays that are not numbers."""
    tensors = {member.name.removesuffix(".npy"): _tensor(file, member) for member in members.values()}
    return TensorFile(file.path, "npz", tensors, {})


def write_npz(path: str | os.PathLike, arrays: Mapping[str, Array]) -> None:
    """Writes an uncompressed npz; a killed process leaves the old file or the new one.

    bfloat16 becomes void V2, as in big_vision.

    Args:
      path: the file; an existing one is replaced.
      arrays: name -> array; lazy arrays are read one at a time and then freed.

    Raises:
      UserError: npz cannot express a dtype.
      ValueError: a lazy array has another shape or dtype than declared.
    """
    with replacing(path) as out, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            dtype = np.dtype(array.dtype).newbyteorder("<")
            if dtype != _BFLOAT16 and (dtype.isbuiltin == 2 or dtype.kind not in "biufc"):
                raise UserError(f"{path}: an npz cannot hold `{name}` {dtype}; expected numbers of numpy or bfloat16")
            header = {"descr": dtype.str, "fortran_order": False, "shape": tuple(array.shape)}
            # A fixed time, so that equal arrays make equal files.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                data = array_bytes(produce(name, array))
                for start in range(0, len(data), _CHUNK):
                    member.write(data[start : start + _CHUNK])
                del data


def _tensor(file: RegularFile, member: Member) -> Tensor:
    dtype, fortran_order, shape, start = _header(file, member)
    check_shape(file.path, member.name, shape, dtype)
    size = math.prod(shape) * dtype.itemsize
    if start + size != member.size:
        raise UserError(
            f"{file.path}: `{member.name}` has {member.size:,} bytes, its header describes {start + size:,}; "
            "it is damaged, download it again"
        )
    strides = c_strides(shape[::-1], dtype.itemsize)[::-1] if fortran_order else c_strides(shape, dtype.itemsize)
    if member.offset is not None:
        return stored_tensor(file, member.name, dtype, shape, member.offset + start, strides)

    def load(index: tuple[slice, ...]) -> np.ndarray:
        data = bytearray(member.size)
        if member.read_into(data) != member.size:
            raise UserError(f"{file.path}: `{member.name}` unpacks to less than it declares; download it again")
        whole = np.ndarray(shape, dtype, data, start, strides)
        part = whole[index]
        return part if part.size == whole.size else part.copy()

    return Tensor(shape, dtype.newbyteorder("="), load)


def _header(file: RegularFile, member: Member) -> tuple[np.dtype, bool, tuple[int, ...], int]:
    """dtype, Fortran order, shape, and where the data begins."""
    head = member.read(12)
    wide = head[6:7] >= b"\x02"
    if not member.name.endswith(".npy") or head[:6] != b"\x93NUMPY" or len(head) < 12 or head[6] not in (1, 2, 3):
        raise UserError(f"{file.path}: `{member.name}` is no .npy array; expected nothing else in an npz")
    (length,) = struct.unpack("<I", head[8:12]) if wide else struct.unpack("<H", head[8:10])
    start = (12 if wide else 10) + length
    if length > min(_MAX_HEADER, member.size):
        raise UserError(
            f"{file.path}: `{member.name}` claims a header of {length:,} bytes; it is damaged, download it again"
        )
    match = _HEADER.fullmatch(member.read(start)[-length:].decode("latin1"))
    if match is None or any(len(size) > 18 for size in re.findall(r"\d+", match["shape"])):
        raise UserError(f"{file.path}: the header of `{member.name}` is damaged; download it again")
    shape = tuple(int(size) for size in re.findall(r"\d+", match["shape"]))
    return _dtype(file, member, match["descr"]), match["fortran_order"] == "True", shape, start


def _dtype(file: RegularFile, member: Member, descr: str) -> np.dtype:
    """The dtype of a header's descr, which is in Python's notation."""
    if descr in ("'|V2'", "'<V2'"):  # how numpy writes bfloat16
        return _BFLOAT16
    if "O" in descr:
        raise UserError(f"{file.path}: `{member.name}` holds Python objects, which could run code; they are never read")
    if not re.fullmatch(r"'[<>|]([iu][1248]|f[248]|c8|c16|b1)'", descr):
        raise UserError(f"{file.path}: `{member.name}` has dtype {descr[:40]}; expected numbers (or V2, bfloat16)")
    return np.dtype(descr.strip("'"))
