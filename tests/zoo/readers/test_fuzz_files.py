"""Damaged files of every kind: each is read, or refused in one line; none crashes, runs code or eats memory.

The mutations are drawn from fixed seeds. What a mutation can reach is small by construction (every file has some
kilobytes), so the bound on memory catches sizes that are believed before they are checked.
"""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest

from tests.support.fuzz_checkpoints import SEEDS, read_all
from tests.support.tensor_files import mutate
from tests.support.torch_pickles import STATE, STORAGES, hostile_pickles
from tests.support.torch_writer import legacy_bytes, zip_bytes

MUTATIONS = 200  # of each kind of file


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
