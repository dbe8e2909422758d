"""An index: a file that chooses examples of a source, in an order, and may weight them."""

import os
import zipfile

import numpy as np

from vlm_jax.errors import UserError

# A zip file may unpack to so many bytes, or to so many times its size.
MAX_BYTES, MAX_RATIO = 2**28, 50


def read(path: str, size: int, uri: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the chosen examples' numbers, int64 [n], and weights, float [n]; a weight defaults to 1.

    Args:
      path: an .npz file with `index`, integers [n], and optionally `weight`, floats [n]; or an .npy file of `index`.
      size: examples of the source.
      uri: the source, for messages.

    Raises:
      UserError: the file cannot be read, has other arrays, types or shapes, or names an example outside the source.
    """
    what = f"index `{path}`"
    if not os.path.exists(path):
        raise UserError(f"{what} does not exist; write it with `np.savez({path!r}, index=...)`")
    try:
        if not os.path.isfile(path):
            raise ValueError("a FIFO, a device or a folder")
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as members:
                unpacked = sum(member.file_size for member in members.infolist())
            if unpacked > max(MAX_BYTES, MAX_RATIO * os.path.getsize(path)):
                raise ValueError("a decompression bomb")
        file = np.load(path, allow_pickle=False)
        arrays = dict(file) if isinstance(file, np.lib.npyio.NpzFile) else {"index": file}
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise ValueError("no arrays")
    except Exception:  # of damaged or made-up files, dozens of types
        raise UserError(f"{what} cannot be read; expected an .npz or .npy file of numbers") from None
    if not {"index"} <= set(arrays) <= {"index", "weight"}:
        raise UserError(
            f"{what} has the arrays {', '.join(arrays)}; expected `index`, and `weight` if examples have one"
        )
    index = arrays["index"]
    weight = arrays.get("weight", np.ones(np.shape(index)))
    if index.ndim != 1 or not np.issubdtype(index.dtype, np.integer):
        raise UserError(f"{what}: `index` is {index.dtype} {list(index.shape)}; expected integers [n]")
    if weight.shape != index.shape or not np.issubdtype(weight.dtype, np.floating) or not np.isfinite(weight).all():
        raise UserError(
            f"{what}: `weight` is {weight.dtype} {list(weight.shape)}; expected finite floats {list(index.shape)}"
        )
    outside = index[(index < 0) | (index >= size)]
    if len(outside):
        raise UserError(f"{what} names example {outside[0]}; `{uri}` has {size} examples, from 0 to {size - 1}")
    return index.astype(np.int64), weight
