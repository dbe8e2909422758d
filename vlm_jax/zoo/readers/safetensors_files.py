"""safetensors files: a JSON header, then the tensors' bytes (https://github.com/huggingface/safetensors#format)."""

import json
import math
import os
import struct
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from vlm_jax.data.files import replacing
from vlm_jax.errors import UserError
from vlm_jax.zoo.readers.stored import (
    Array,
    RegularFile,
    TensorFile,
    array_bytes,
    check_shape,
    error_text,
    produce,
    stored_tensor,
)

MAX_HEADER = 100_000_000  # bytes, as in the reference library

# Widest first, the order of the reference library, which aligns every tensor.
DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        "U64": np.uint64,
        "I64": np.int64,
        "F64": np.float64,
        "C64": np.complex64,
        "F32": np.float32,
        "U32": np.uint32,
        "I32": np.int32,
        "BF16": ml_dtypes.bfloat16,
        "F16": np.float16,
        "U16": np.uint16,
        "I16": np.int16,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I8": np.int8,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def open_safetensors(file: RegularFile) -> TensorFile:
    """Reads and checks the header; raises a UserError that names the fault."""
    header, start = _header(file)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(type(value) is str for value in metadata.values()):
        raise UserError(f"{file.path}: __metadata__ is {type(metadata).__name__}; expected an object of strings")
    places = {name: _place(file, name, entry) for name, entry in header.items()}
    names = sorted(places, key=lambda name: places[name][2:])
    end = 0
    for name in names:
        _, _, first, last = places[name]
        if first != end:
            raise UserError(
                f"{file.path}: tensor `{name}` begins at byte {first:,} of the data, the one before ends at {end:,}; "
                "expected neither overlaps nor holes; the file is damaged, download it again"
            )
        end = last
    if start + end != file.size:
        raise UserError(
            f"{file.path} has {file.size:,} bytes, its header describes {start + end:,}; "
            "it is truncated or damaged, download it again"
        )
    tensors = {}
    for name in names:
        dtype, shape, first, _ = places[name]
        tensors[name] = stored_tensor(file, name, dtype, shape, start + first)
    return TensorFile(file.path, "safetensors", tensors, metadata)


def write_safetensors(
    path: str | os.PathLike,
    arrays: Mapping[str, Array],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file; a killed process leaves the old file or the new one.

    Bytes and order are the reference library's.

    Args:
      path: the file; an existing one is replaced.
      arrays: name -> array; lazy arrays are read one at a time and then freed.
      metadata: strings, for `__metadata__`.

    Raises:
      UserError: the format lacks a dtype.
      ValueError: a lazy array has another shape or dtype than declared.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    if not all(type(text) is str for text in (*(metadata or {}), *(metadata or {}).values())):
        raise UserError(f"{path}: metadata of safetensors is strings only; came {metadata}")
    for name, array in arrays.items():
        if _dtype(array) not in _NAMES or name == "__metadata__":
            raise UserError(
                f"{path}: safetensors cannot hold `{name}` {array.dtype}; expected one of {', '.join(_NAMES.values())}"
            )
    order = list(_NAMES)
    names = sorted(arrays, key=lambda name: (order.index(_dtype(arrays[name])), name))
    offset = 0
    for name in names:
        dtype, shape = _dtype(arrays[name]), arrays[name].shape
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            out.write(array_bytes(produce(name, arrays[name])))


def _dtype(array: Array) -> np.dtype:
    return np.dtype(array.dtype).newbyteorder("=")


def _header(file: RegularFile) -> tuple[dict[str, Any], int]:
    """Returns the header and the byte where the data begins; checks the length before allocating."""
    (length,) = struct.unpack("<Q", file.read(0, 8))
    if length > min(MAX_HEADER, file.size - 8):
        raise UserError(
            f"{file.path} ({file.size:,} bytes) claims a header of {length:,} bytes; expected at most "
            f"{MAX_HEADER:,} and no more than the file holds; it is damaged, download it again"
        )
    try:
        header = json.loads(file.read(8, length).decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{file.path}: its header is not the JSON of safetensors ({error_text(error)}); download it again"
        ) from error
    if not isinstance(header, dict):
        raise UserError(f"{file.path}: its header is a {type(header).__name__}; expected an object of tensors")
    return header, 8 + length


def _place(file: RegularFile, name: str, entry: Any) -> tuple[np.dtype, list[int], int, int]:
    """dtype, shape, first and last byte of one entry of the header."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{file.path}: tensor `{name}` is {str(entry)[:80]}; expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(
            f"{file.path}: tensor `{name}` has dtype {str(dtype)[:40]}; expected one of {', '.join(DTYPES)}"
        )
    if not isinstance(shape, list) or not isinstance(offsets, list) or [type(o) for o in offsets] != [int, int]:
        raise UserError(f"{file.path}: tensor `{name}` has shape {shape} at {offsets}; expected two lists of integers")
    check_shape(file.path, name, shape, DTYPES[dtype])
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[0] < 0 or offsets[1] - offsets[0] != expected:
        raise UserError(
            f"{file.path}: tensor `{name}` {dtype}{shape} needs {expected:,} bytes; the header gives it {offsets}"
        )
    return DTYPES[dtype], shape, *offsets


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name stands there twice")
    return dict(pairs)
