"""Writes what torch.save and torch.jit.save write, without torch: pickle instructions and storages by hand."""

import dataclasses
import io
import struct
import zipfile
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

STORAGE_OF = {"float32": "Float", "float16": "Half", "int64": "Long", "bool": "Bool", "bfloat16": "BFloat16"}
MAGIC = 0x1950A86A20F9469CFC6C


@dataclasses.dataclass
class Name:
    """A global, "module name" with the last dot between them."""

    name: str


@dataclasses.dataclass
class Call:
    """REDUCE: a global called with arguments; then BUILD, if there is a state."""

    name: str
    arguments: tuple
    state: Any = None


@dataclasses.dataclass
class Object:
    """NEWOBJ and BUILD."""

    name: str
    state: Any


@dataclasses.dataclass
class Persistent:
    """BINPERSID."""

    identity: tuple


def dumps(value: Any, keys: set | None = None) -> bytes:
    """A pickle of protocol 2; the keys of the storages that it names are added to `keys`."""
    return b"\x80\x02" + _emit(value, set() if keys is None else keys) + b"."


def _emit(value: Any, keys: set) -> bytes:
    emit = partial(_emit, keys=keys)
    match value:
        case bytes(code):  # instructions as they are
            return code
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            size = value.bit_length() // 8 + 1
            return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return b"(" + b"".join(map(emit, value)) + b"t"
        case list():
            return b"](" + b"".join(map(emit, value)) + b"e"
        case dict():
            return b"}(" + b"".join(emit(key) + emit(part) for key, part in value.items()) + b"u"
        case Name(name):
            return "c{}\n{}\n".format(*name.rsplit(".", 1)).encode()
        case Call(name, arguments, state):
            return emit(Name(name)) + emit(arguments) + b"R" + (b"" if state is None else emit(state) + b"b")
        case Object(name, state):
            return emit(Name(name)) + b")\x81" + emit(state) + b"b"
        case Persistent(identity):
            keys.add(identity[2])
            return emit(identity) + b"Q"
    raise TypeError(value)


def tensor(key: str, storage: np.ndarray, view: np.ndarray, size: int | None = None, name: str = "v2") -> Call:
    """The pickle of `view`, a view of the flat array `storage` that is saved under `key`."""
    itemsize = storage.itemsize
    offset = (view.__array_interface__["data"][0] - storage.__array_interface__["data"][0]) // itemsize
    kind = Name(f"torch.{STORAGE_OF[str(storage.dtype)]}Storage")
    identity = Persistent(("storage", kind, key, "cpu", storage.size if size is None else size))
    strides = tuple(stride // itemsize for stride in view.strides)
    arguments = (identity, offset, view.shape, strides, False, Call("collections.OrderedDict", ()))
    return Call(f"torch._utils._rebuild_tensor_{name}", arguments)


def zip_bytes(
    value: Any, storages: Mapping[str, np.ndarray], others: Mapping[str, bytes] | None = None, compression: int = 0
) -> bytes:
    """A zip archive of torch.save; `others` are further members (code/, constants.pkl: TorchScript)."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        members = {"data.pkl": dumps(value), "byteorder": b"little"}
        members |= {f"data/{key}": array.tobytes() for key, array in storages.items()}
        for name, data in (members | dict(others or {})).items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data, compress_type=compression)
    return out.getvalue()


def legacy_bytes(value: Any, storages: Mapping[str, np.ndarray], little_endian: bool = True) -> bytes:
    """A file of torch < 1.6."""
    system = {"protocol_version": 1001, "little_endian": little_endian}
    keys: set = set()
    code = dumps(value, keys)
    keys &= set(storages)
    head = b"".join(map(dumps, (MAGIC, 1001, system))) + code + dumps(sorted(keys))
    return head + b"".join(struct.pack("<q", storages[key].size) + storages[key].tobytes() for key in sorted(keys))
