"""npz files of numpy and big_vision: read by slice, bfloat16 as V2, and nothing else than arrays of numbers."""

import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from tests.support.tensor_files import ARRAYS, RNG, assert_reads
from vlm_jax.errors import UserError
from vlm_jax.zoo.readers.tensors import open_tensors, write_npz


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_of_numpy(tmp_path, save):
    arrays = {name: array for name, array in ARRAYS.items() if name != "é \n"}
    fortran = np.asfortranarray(RNG.standard_normal((4, 5, 6)))
    big = np.arange(6, dtype=">i4").reshape(2, 3)
    save(tmp_path / "w.npz", **arrays, fortran=fortran, big=big)
    file = open_tensors(tmp_path / "w.npz")
    assert file.kind == "npz" and list(file.tensors) == [*arrays, "fortran", "big"]
    assert_reads(file, {**arrays, "fortran": np.ascontiguousarray(fortran), "big": big.astype("<i4")})
    index = (slice(1, 3), slice(None), slice(0, 6, 2))
    np.testing.assert_array_equal(file.tensors["fortran"].read(index), fortran[index])
    np.testing.assert_array_equal(file.tensors["big"].read((slice(1, 2),)), big[1:2])


def test_npz_that_we_write_is_as_big_vision_has_it(tmp_path):
    write_npz(tmp_path / "w.npz", ARRAYS)
    assert_reads(open_tensors(tmp_path / "w.npz"), ARRAYS)
    with np.load(tmp_path / "w.npz") as loaded:
        assert loaded["a"].dtype == np.dtype("V2") and loaded["a"].tobytes() == ARRAYS["a"].tobytes()
        np.testing.assert_array_equal(loaded["b/kernel"], ARRAYS["b/kernel"])
    first = (tmp_path / "w.npz").read_bytes()
    write_npz(tmp_path / "w.npz", ARRAYS)
    assert (tmp_path / "w.npz").read_bytes() == first


def npy(shape="(2,)", descr="'<f4'", data=bytes(8), version=b"\x01\x00", length=None):
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    size = len(text) if length is None else length
    return b"\x93NUMPY" + version + struct.pack("<H" if version < b"\x02" else "<I", size) + text + data


@pytest.mark.parametrize(
    "data, message",
    [
        (npy(descr="'|O'"), "holds Python objects, which could run code"),
        (npy(descr="[('a', '|O')]"), "holds Python objects"),
        (npy(descr="'<U2'"), "has dtype '<U2'; expected numbers"),
        (npy(descr="'|V1'"), "expected numbers"),
        (npy(descr="'<f3'"), "expected numbers"),
        (npy(descr="[('a', '<f4')]"), "expected numbers"),
        (npy(shape="(3,)"), "its header describes"),
        (npy(shape="(1000000, 1000000)"), "its header describes"),
        (npy(shape="(99999999999999999999,)"), "header of `w.npy` is damaged"),
        (npy(shape="(999999999999999999, 999999999999999999, 0)"), "that no array can have"),
        (npy(shape="(-2,)"), "header of `w.npy` is damaged"),
        (npy(shape="__import__('os')"), "header of `w.npy` is damaged"),
        (npy(data=bytes(7)), "its header describes"),
        (npy(version=b"\x09\x00"), "is no .npy array"),
        (npy(version=b"\x02\x00", length=1 << 31), "claims a header of 2,147,483,648 bytes"),
        (npy(length=0), "is damaged"),
        (b"\x93NUMPY", "is no .npy array"),
        (b"", "is no .npy array"),
        (b"hello world, hello world", "is no .npy array"),
    ],
)
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_npz_with_what_is_no_array_of_numbers(tmp_path, data, message, compression):
    with zipfile.ZipFile(tmp_path / "w", "w", compression) as archive:
        archive.writestr("w.npy", data)
    with pytest.raises(UserError, match=message):
        open_tensors(tmp_path / "w")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_lie(tmp_path):
    path = tmp_path / "w"
    cases = {"two members of one name": ["w.npy", "w.npy"], "`readme.txt` is no .npy array": ["w.npy", "readme.txt"]}
    for message, names in cases.items():
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, npy())
        with pytest.raises(UserError, match=message):
            open_tensors(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("w.npy", npy())
    with pytest.raises(UserError, match="packed in a way that no checkpoint is"):
        open_tensors(path)


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    """The directory declares 1 GB; what is packed there is some hundred bytes."""
    declared = npy(shape="(250000000,)", data=b"")
    with zipfile.ZipFile(tmp_path / "w", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w.npy", npy(shape="(250000000,)"))
    size = struct.pack("<I", 1_000_000_000 + len(declared))
    data = (tmp_path / "w").read_bytes().replace(struct.pack("<I", 8 + len(declared)), size)
    (tmp_path / "w").write_bytes(data)
    tracemalloc.start()
    with pytest.raises(UserError, match="more than it can unpack to"):
        open_tensors(tmp_path / "w")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6


def test_an_array_that_unpacks_to_less(tmp_path):
    with zipfile.ZipFile(tmp_path / "w", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w.npy", npy(shape="(20,)"))
    size = len(npy(shape="(20,)"))
    data = (tmp_path / "w").read_bytes().replace(struct.pack("<I", size), struct.pack("<I", size + 72))
    (tmp_path / "w").write_bytes(data)
    tensor = open_tensors(tmp_path / "w").tensors["w"]
    with pytest.raises(UserError, match=r"unpacks to less|damaged zip archive"):
        tensor.read()
