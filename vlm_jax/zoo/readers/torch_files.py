"""Files of torch.save (.pt, .pth, .bin), zip and legacy, and TorchScript archives, read without torch.

torch/serialization.py describes both; see `vlm_jax.zoo.readers.torch_pickle` for why nothing in them is executed.
"""

import io
import struct
from collections.abc import Mapping
from typing import Any

from vlm_jax.errors import UserError
from vlm_jax.zoo.readers import state_dicts
from vlm_jax.zoo.readers.stored import RegularFile, Tensor, TensorFile, stored_tensor
from vlm_jax.zoo.readers.torch_pickle import MAX_BYTES, Global, Record, Storage, StridedTensor, TorchPickle
from vlm_jax.zoo.readers.zip_members import Member

LEGACY_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
_PROTOCOL = 1001  # of the legacy format; it has never had another
_MAX_DEPTH, _MAX_VALUES, _MAX_NAME = 64, 250_000, 500


def is_pickle(name: str) -> bool:
    """Whether a member is the pickle that marks a zip archive as torch's."""
    return name.endswith("/data.pkl") and name.count("/") == 1


def open_torch_zip(file: RegularFile, members: Mapping[str, Member], weights: str | None = None) -> TensorFile:
    """Returns the tensors of a zip archive that `torch.save` or `torch.jit.save` wrote.

    A module of TorchScript becomes its state: parameters, buffers and other tensors by dotted name. `weights`: see
    `state_dicts.select`.

    Raises:
      UserError: the pickle asks for anything but tensors and plain values, or the archive is damaged.
    """
    root, *more = [name.removesuffix("data.pkl") for name in members if is_pickle(name)]
    if more:
        raise UserError(f"{file.path} holds {1 + len(more)} pickles; expected one data.pkl; it is damaged")
    script = f"{root}constants.pkl" in members or any(name.startswith(f"{root}code/") for name in members)
    order = members[f"{root}byteorder"].read(16) if f"{root}byteorder" in members else b"little"
    if order != b"little":
        raise UserError(
            f"{file.path} has byte order {order!r}; expected little; save it again on a little-endian machine"
        )
    if members[f"{root}data.pkl"].size > MAX_BYTES:
        raise UserError(
            f"{file.path}: its data.pkl has over {MAX_BYTES:,} bytes; expected tensors in storages of their own"
        )
    data = members[f"{root}data.pkl"].read(MAX_BYTES)
    pickle = TorchPickle(file.path, io.BytesIO(data), len(data), script)
    value = pickle.load()
    regions = {
        key: _zip_region(file, members, f"{root}data/{key}", storage) for key, storage in pickle.storages.items()
    }
    return _tensor_file(file, "torchscript" if script else "torch", value, regions, weights)


def open_torch_legacy(file: RegularFile, weights: str | None = None) -> TensorFile:
    """Returns the tensors of a file by torch < 1.6.

    The file has pickles, then every storage as a count and its elements. `weights`: see `state_dicts.select`.

    Raises:
      UserError: a pickle asks for anything but tensors and plain values, or the file is damaged.
    """
    with file.open() as handle:
        stream = io.BufferedReader(handle)
        pickle = TorchPickle(file.path, stream, file.size)
        magic, protocol, system = pickle.load(), pickle.load(), pickle.load()
        if magic != int.from_bytes(LEGACY_MAGIC, "little") or protocol != _PROTOCOL:
            raise UserError(
                f"{file.path} is a pickle, but none that torch.save wrote; expected tensors; save it as safetensors"
            )
        if type(system) is dict and system.get("little_endian") is False:
            raise UserError(f"{file.path} is big-endian; expected little; save it again on a little-endian machine")
        value, keys = pickle.load(), pickle.load()
        regions, offset = {}, pickle.consumed
        for key in keys if type(keys) is list else ():
            storage = pickle.storages.get(key) if type(key) is str else None
            stream.seek(offset)
            count = stream.read(8)
            if storage is None or key in regions or count != struct.pack("<q", storage.size):
                raise UserError(f"{file.path}: storage {str(key)[:40]} is not as declared; it is truncated or damaged")
            regions[key] = offset + 8
            offset += 8 + storage.nbytes
            if offset > file.size:
                raise UserError(f"{file.path} ends inside storage `{key}`; it is truncated, download it again")
    return _tensor_file(file, "torch_legacy", value, regions, weights)


def _zip_region(file: RegularFile, members: Mapping[str, Member], name: str, storage: Storage) -> int:
    """The byte of the file where a storage begins."""
    member = members.get(name)
    if member is None or member.size < storage.nbytes:
        came = "is missing" if member is None else f"has {member.size:,} bytes"
        raise UserError(f"{file.path}: `{name}` {came}; expected {storage.nbytes:,} bytes; download it again")
    if member.offset is None:
        raise UserError(f"{file.path}: `{name}` is compressed, which torch never does; save it again with torch")
    return member.offset


def _tensor_file(
    file: RegularFile, kind: str, value: Any, regions: Mapping[str, int], weights: str | None
) -> TensorFile:
    """Tensors and plain values by dotted name, without the root above the weights and without wrappers."""
    metadata: dict[str, Any] = {}
    averages: tuple[str, ...] = ()
    if type(value) is dict:
        held = [key for key, part in value.items() if type(part) is dict and _flatten(file, part)[0]]
        if root := state_dicts.root(held, weights):
            rest, metadata = _flatten(file, {key: part for key, part in value.items() if key != root})
            # Optimizer states, averages and the like: named, not read.
            metadata["left_out"] = sorted({name.split(".")[0] for name in rest})
            averages = tuple(key for key in state_dicts.AVERAGES if key in held)
            value = value[root]
    places, plain = _flatten(file, value)
    bare = {state_dicts.bare(name): place for name, place in places.items()}
    places = bare if len(bare) == len(places) else places
    tensors = {name: _stored(file, name, place, regions) for name, place in places.items()}
    return TensorFile(file.path, kind, tensors, {**plain, **metadata}, averages)


def _stored(file: RegularFile, name: str, place: StridedTensor, regions: Mapping[str, int]) -> Tensor:
    if place.storage.key not in regions:
        raise UserError(
            f"{file.path}: storage `{place.storage.key}` of `{name}` is missing; it is truncated or damaged"
        )
    itemsize = place.dtype.itemsize
    offset = regions[place.storage.key] + place.offset * itemsize
    return stored_tensor(file, name, place.dtype, place.shape, offset, [stride * itemsize for stride in place.strides])


def _flatten(file: RegularFile, value: Any) -> tuple[dict[str, StridedTensor], dict[str, Any]]:
    """Tensors and plain values by dotted name."""
    tensors: dict[str, StridedTensor] = {}
    plain: dict[str, Any] = {}
    waiting, count = [("", value, 0)], 0
    while waiting:
        name, value, depth = waiting.pop()
        if type(value) is Record:
            value = value.state if type(value.state) is dict else [value.state]
        parts = list(value.items()) if type(value) is dict else list(enumerate(value)) if _is_list(value) else []
        count += 1 + len(parts)
        if depth > _MAX_DEPTH or count > _MAX_VALUES or len(name) > _MAX_NAME:
            raise UserError(f"{file.path} holds values nested without end, or over {_MAX_VALUES:,}; no checkpoint does")
        if type(value) is dict or not all(_is_plain(part) for _, part in parts):
            join = f"{name}." if name else ""
            waiting += [(f"{join}{str(key)[:_MAX_NAME]}", part, depth + 1) for key, part in reversed(parts)]
            continue
        found, value = (tensors, value) if type(value) is StridedTensor else (plain, _plain(value))
        if name in found:
            raise UserError(f"{file.path} holds two values under the name `{name}`")
        found[name] = value
    return tensors, plain


def _is_list(value: Any) -> bool:
    return type(value) in (list, tuple)


def _is_plain(value: Any) -> bool:
    return value is None or type(value) in (bool, int, float, str, bytes)


def _plain(value: Any) -> Any:
    return value.name if type(value) is Global else None if type(value) is Storage else value
