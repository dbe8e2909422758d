"""Damaged files of every kind: each is read, or refused in one line; none crashes, runs code or eats memory.

The mutations are drawn from fixed seeds. What a mutation can reach is small by construction (every file has some
kilobytes), so the bound on memory catches sizes that are believed before they are checked.
"""

import io
import json
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from tests.support.tensor_files import mutate
from tests.support.torch_pickles import STATE, STORAGES, hostile_pickles
from tests.support.torch_writer import Call, Object, dumps, legacy_bytes, zip_bytes
from vlm_jax.errors import UserError
from vlm_jax.zoo.readers.tensors import open_tensors, write_safetensors

MUTATIONS = 200  # of each kind of file
ARRAYS = {
    "image/kernel": np.arange(60, dtype=np.float32).reshape(3, 4, 5),
    "image/bias": np.arange(8).astype(ml_dtypes.bfloat16),
    "ids": np.arange(6).reshape(2, 3),
    "scale": np.array(2.5, np.float16),
}


def of_safetensors(folder):
    write_safetensors(folder / "seed", ARRAYS, {"format": "np"})
    return (folder / "seed").read_bytes()


def of_npz(folder, save=np.savez):
    out = io.BytesIO()
    save(out, **ARRAYS, fortran=np.asfortranarray(np.ones((3, 4))))
    return out.getvalue()


def of_torch(folder):
    weights = Call("collections.OrderedDict", ([[name, tensor] for name, tensor in STATE.items()],))
    return zip_bytes({"epoch": 3, "state_dict": weights, "args": {"lr": 0.1, "betas": (1, 2)}}, STORAGES)


def of_torchscript(folder):
    module = Object("__torch__.Linear", {"training": True, **STATE})
    return zip_bytes(Object("__torch__.CLIP", {"visual": module}), STORAGES, {"constants.pkl": dumps(())})


def of_index(folder):
    write_safetensors(folder / "shard", ARRAYS)
    return json.dumps({"metadata": {"a": 1}, "weight_map": dict.fromkeys(ARRAYS, "shard")}).encode()


SEEDS = {
    "safetensors": of_safetensors,
    "npz": of_npz,
    "npz_compressed": lambda folder: of_npz(folder, np.savez_compressed),
    "torch": of_torch,
    "torchscript": of_torchscript,
    "torch_legacy": lambda folder: legacy_bytes({"model": STATE, "step": 1}, STORAGES),
    "index": of_index,
}


def read_all(path) -> bool:
    """Whether the file is read, every tensor of it; False where a UserError of one line refuses it."""
    try:
        for tensor in open_tensors(path).tensors.values():
            array = tensor.read()
            assert array.shape == tensor.shape and array.dtype == tensor.dtype
            tensor.read(tuple(slice(0, None, 2) for _ in tensor.shape))
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1500
        return False
    return True


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", SEEDS)
def test_mutated_files_are_read_or_refused(kind, tmp_path):
    seed = SEEDS[kind](tmp_path)
    path = tmp_path / "mutated"
    path.write_bytes(seed)
    assert read_all(path)
    rng = np.random.default_rng(list(kind.encode()))
    refused = 0
    tracemalloc.start()
    for _ in range(MUTATIONS):
        path.write_bytes(mutate(seed, rng))
        refused += not read_all(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6
    assert refused > MUTATIONS / 3  # the mutations do reach what is checked
    assert {entry.name for entry in tmp_path.iterdir()} <= {"mutated", "seed", "shard"}


@pytest.mark.parametrize("kind", ["torch", "torchscript", "torch_legacy"])
def test_mutated_files_that_would_run_code_never_do(kind, tmp_path):
    """Every hostile pickle, put into every kind of torch file, whole and mutated."""
    target, path = tmp_path / "made", tmp_path / "file"
    rng = np.random.default_rng(0)
    for code, _ in hostile_pickles(target).values():
        payload = {"w": code[2:].removesuffix(b"."), "rest": STATE["whole"]}
        others = {"code/x.py": b"open(%r, 'w')" % str(target), "constants.pkl": code} if kind == "torchscript" else {}
        data = legacy_bytes(payload, STORAGES) if kind == "torch_legacy" else zip_bytes(payload, STORAGES, others)
        path.write_bytes(data)
        assert not read_all(path)
        for _ in range(8):
            path.write_bytes(mutate(data, rng))
            read_all(path)
    assert not target.exists()


def test_every_byte_of_a_zip_directory(tmp_path):
    """Where the sizes and places stand that a reader is tempted to believe."""
    npy, out = io.BytesIO(), io.BytesIO()
    np.save(npy, np.arange(3.0))
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("w.npy", npy.getvalue())
    data = out.getvalue()
    start = data.index(b"PK\x01\x02")
    path = tmp_path / "mutated"
    tracemalloc.start()
    for at in range(start, len(data)):
        for value in (0x00, 0x7F, 0xFF):
            path.write_bytes(data[:at] + bytes([value]) + data[at + 1 :])
            read_all(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6
