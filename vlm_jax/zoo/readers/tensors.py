"""Files of tensors: safetensors, npz and torch, read by content, one tensor at a time, nothing executed.

file = open_tensors("model.safetensors")         # headers only
file.tensors["logit_scale"].read()
write_safetensors("copy.safetensors", file.tensors)
"""

import dataclasses
import json
import os

from vlm_jax.errors import UserError
from vlm_jax.zoo.readers import state_dicts
from vlm_jax.zoo.readers.npz_files import open_npz, write_npz
from vlm_jax.zoo.readers.safetensors_files import open_safetensors, write_safetensors
from vlm_jax.zoo.readers.stored import RegularFile, Tensor, TensorFile, error_text, regular_file
from vlm_jax.zoo.readers.torch_files import is_pickle, open_torch_legacy, open_torch_zip
from vlm_jax.zoo.readers.zip_members import zip_members

__all__ = ["Tensor", "TensorFile", "open_tensors", "open_weights", "write_npz", "write_safetensors"]

_MAX_INDEX = 100_000_000  # bytes
_EXPECTED = "expected safetensors, an npz, a torch .pt/.pth/.bin, or the .index.json of such shards"

# Other files that users find under these names: first bytes, kind of file, fix.
_OTHERS = (
    (b"version https://git-lfs", "a git LFS pointer, not the file itself", "run `git lfs pull`, or download the file"),
    (b"<!doctype html", "an HTML page", "download the file itself (a login or error page came instead)"),
    (b"<html", "an HTML page", "download the file itself (a login or error page came instead)"),
    (b"\x93NUMPY", "a single array of numpy", "save it by name with np.savez"),
    (b"\x89HDF", "an HDF5 file", "convert it to safetensors"),
    (b"GGUF", "a GGUF file", "convert it to safetensors"),
    (b"\x1f\x8b", "packed with gzip", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "packed with zstd", "unpack it"),
)


def open_weights(path: str | os.PathLike, weights: str | None = None) -> TensorFile:
    """Opens a file as `open_tensors` does, with a model's own names: no wrappers, roots and averages.

    Args:
      path: as for `open_tensors`.
      weights: "ema" selects averaged weights, None the trained ones, see `state_dicts.select`.

    Raises:
      UserError: as `open_tensors`; or the file lacks the selected weights.
    """
    file = open_tensors(path, weights)
    if file.kind == "npz" and weights is None:
        return file
    tensors = state_dicts.select(file.tensors, file.path, weights, file.averages)
    return dataclasses.replace(file, tensors=tensors)


def open_tensors(path: str | os.PathLike, weights: str | None = None) -> TensorFile:
    """Opens a file of tensors, or the index of shards, as one file; reads only headers.

    Args:
      path: a safetensors, npz or torch file, whatever its name, or a `.index.json` beside its shards. Symbolic links
        (as in the Hugging Face cache) are followed to regular files.
      weights: of a torch checkpoint that holds averages beside the weights: "ema" opens the averages.

    Raises:
      UserError: the file is none of these, is damaged, or asks for anything but tensors.
    """
    file = regular_file(path)
    head = file.read(0, 64)
    if head.lstrip()[:1] == b"{" and head[7:8] != b"\0":  # that byte of safetensors belongs to the header's length
        return _open_index(file, weights)
    return _open_file(file, weights)


def _open_file(file: RegularFile, weights: str | None) -> TensorFile:
    head = file.read(0, 512)
    if not head:
        raise UserError(f"{file.path} is empty (0 bytes); {_EXPECTED}; download it again")
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        members = zip_members(file)
        if any(is_pickle(name) for name in members):
            return open_torch_zip(file, members, weights)
        if any(name.endswith(".npy") for name in members):
            return open_npz(file, members)
        raise UserError(f"{file.path} is a zip archive without tensors; {_EXPECTED}")
    if head[8:9] == b"{":
        return open_safetensors(file)
    if head[:1] == b"\x80":
        return open_torch_legacy(file, weights)
    what, fix = f"no file of tensors (it begins with {head[:16]!r})", "look at what was downloaded"
    if head[257:262] == b"ustar":
        what, fix = "a tar archive (torch before 0.1.10 wrote such)", "save it again with a newer torch, or unpack it"
    for start, name, mend in _OTHERS:
        if head.lstrip()[: len(start)].lower() == start.lower():
            what, fix = name, mend
    raise UserError(f"{file.path} is {what}; {_EXPECTED}; {fix}")


def _open_index(file: RegularFile, weights: str | None) -> TensorFile:
    """The shards that {"weight_map": {tensor: file}} names, all beside the index, as one file."""
    if file.size > _MAX_INDEX:
        raise UserError(
            f"{file.path} has {file.size:,} bytes of JSON; an index has at most {_MAX_INDEX:,}; {_EXPECTED}"
        )
    try:
        index = json.loads(file.read(0, file.size))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file.path} is damaged JSON ({error_text(error)}); {_EXPECTED}") from error
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places or not all(type(shard) is str for shard in places.values()):
        raise UserError(f'{file.path} is JSON without a "weight_map" of tensors to files; {_EXPECTED}')
    shards = {}
    for shard in sorted(set(places.values())):
        if not shard.isprintable() or "/" in shard or "\\" in shard or shard in ("", ".", ".."):
            raise UserError(
                f"{file.path} names the shard {shard[:200]!r}; expected the name of a file in its own folder"
            )
        shards[shard] = _open_file(regular_file(file.path.parent / shard), weights)
    for name, shard in places.items():
        if name not in shards[shard].tensors:
            raise UserError(
                f"{file.path}: tensor `{' '.join(name.split())[:200]}` is not in {shard}; the shards are "
                "not of this index, download them again"
            )
    tensors = {
        name: tensor
        for shard, opened in shards.items()
        for name, tensor in opened.tensors.items()
        if places.get(name) == shard
    }
    metadata = {key: value for opened in shards.values() for key, value in opened.metadata.items()}
    own = index.get("metadata")
    kind = next(iter(shards.values())).kind
    return TensorFile(file.path, kind, tensors, metadata | (own if isinstance(own, dict) else {}))
