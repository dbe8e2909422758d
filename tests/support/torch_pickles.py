"""What files of torch hold: a state dict of views into shared storages, and pickles that would run code."""

import os
import pickle
import struct

import ml_dtypes
import numpy as np

from tests.support.torch_writer import tensor

FLOATS = np.arange(24, dtype=np.float32)
HALVES = np.arange(10).astype(np.float16)
BFLOATS = np.arange(6).astype(ml_dtypes.bfloat16)
STORAGES = {"0": FLOATS, "1": HALVES, "2": BFLOATS}
MATRIX = FLOATS.reshape(4, 6)
VIEWS = {
    "whole": MATRIX,
    "tied": MATRIX,
    "transposed": MATRIX.T,
    "cut": MATRIX[1:3, 1::2],
    "scalar": FLOATS[5:6].reshape(()),
    "expanded": np.broadcast_to(FLOATS[2:5], (2, 3)),
    "half": HALVES.reshape(5, 2),
    "bfloat": BFLOATS.reshape(2, 3).T,
}
KEYS = {"half": "1", "bfloat": "2"}
STATE = {name: tensor(KEYS.get(name, "0"), STORAGES[KEYS.get(name, "0")], view) for name, view in VIEWS.items()}


class Hostile:
    """Its pickle runs a command when it is loaded by Python."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def hostile_pickles(target) -> dict[str, tuple[bytes, str]]:
    """Pickles that would make the file `target`, and the name that each asks for."""
    string = lambda text: b"X" + struct.pack("<I", len(text)) + text.encode()
    word, touch = string(f"open({str(target)!r}, 'w')"), string(f"touch {target}")
    short = lambda name: b"\x8c" + bytes([len(name)]) + name
    return {
        "system": (b"\x80\x02cos\nsystem\n" + touch + b"\x85R.", "os.system"),
        "reduce": (pickle.dumps(Hostile(target), 2), "posix.system"),
        "reduce 4": (pickle.dumps(Hostile(target), 4), "posix.system"),
        "eval": (b"\x80\x02c__builtin__\neval\n" + word + b"\x85R.", "__builtin__.eval"),
        "stack": (b"\x80\x04" + short(b"builtins") + short(b"exec") + b"\x93" + word + b"\x85R.", "builtins.exec"),
        "inst": (b"\x80\x02(" + word + b"ibuiltins\neval\n.", "builtins.eval"),
        "dotted": (
            b"\x80\x04" + short(b"collections") + short(b"OrderedDict.__init__") + b"\x93.",
            "OrderedDict.__init__",
        ),
        "torch": (b"\x80\x02ctorch.hub\nload\n.", "torch.hub.load"),
        "scalar": (b"\x80\x02cnumpy.core.multiarray\nscalar\n.", "numpy.core.multiarray.scalar"),
        "after": (b"\x80\x02}X\x01\x00\x00\x00acos\nsystem\ns.", "os.system"),
    }
