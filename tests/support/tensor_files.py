"""Arrays to write into files of tensors, what reading them must give, and how files are damaged."""

import ml_dtypes
import numpy as np

RNG = np.random.default_rng(0)
ARRAYS = {
    "b/kernel": RNG.standard_normal((5, 7, 3)).astype(np.float32),
    "a": RNG.standard_normal((4, 6)).astype(ml_dtypes.bfloat16),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 3), np.float16),
    "ids": np.arange(9),
    "mask": np.array([True, False, True]),
    "é \n": np.arange(4, dtype=np.uint8),
}


def assert_reads(file, arrays):
    assert set(file.tensors) == set(arrays)
    for name, array in arrays.items():
        tensor = file.tensors[name]
        came = tensor.read()
        assert (came.shape, came.dtype) == (tensor.shape, tensor.dtype) == (array.shape, array.dtype), name
        assert came.tobytes() == array.tobytes() and came.flags.writeable and came.flags.c_contiguous


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Cuts, flips, overwrites with extreme numbers, or splices pieces of the file into itself; headers more often."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        if not data:
            break
        reach = len(data) if rng.random() < 0.5 else min(len(data), 300)
        at = len(data) - 1 - int(rng.integers(reach)) if rng.random() < 0.3 else int(rng.integers(reach))
        other, size = int(rng.integers(len(data))), int(rng.integers(1, 40))
        match rng.integers(6):
            case 0:
                del data[max(1, at) :]
            case 1:
                data[at] ^= 1 << int(rng.integers(8))
            case 2:
                data[at] = int(rng.choice([0, 1, 0x28, 0x5D, 0x72, 0x7B, 0x80, 0x8E, 0xFF]))
            case 3:
                extreme = [
                    b"\xff" * 8,
                    b"\xff" * 3 + b"\x7f",
                    b"\0" * 8,
                    b"9" * 12,
                    b"-1",
                    (10**10).to_bytes(8, "little"),
                ]
                piece = extreme[rng.integers(len(extreme))]
                data[at : at + len(piece)] = piece
            case 4:
                data[at:at] = data[other : other + size]
            case 5:
                del data[at : at + size]
    return bytes(data)
