"""Files of tensors are read lazily and exactly, written whole or not at all, and refused in one line when damaged."""

import io
import json
import os
import struct
import tarfile
import tracemalloc
import weakref
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from tests.support.tensor_files import ARRAYS, RNG, assert_reads
from tests.support.torch_writer import zip_bytes
from vlm_jax.errors import UserError
from vlm_jax.zoo.readers import stored
from vlm_jax.zoo.readers.safetensors_files import DTYPES
from vlm_jax.zoo.readers.tensors import Tensor, open_tensors, write_npz, write_safetensors

# safetensors


def test_safetensors_round_trip(tmp_path):
    write_safetensors(tmp_path / "w", ARRAYS, {"format": "np", "licence": "MIT"})
    file = open_tensors(tmp_path / "w")
    assert file.kind == "safetensors" and file.metadata == {"format": "np", "licence": "MIT"}
    assert_reads(file, ARRAYS)
    with safetensors.safe_open(tmp_path / "w", "np") as library:
        assert library.metadata() == file.metadata and set(library.keys()) == set(ARRAYS)
        np.testing.assert_array_equal(library.get_tensor("b/kernel"), ARRAYS["b/kernel"])


def test_safetensors_bytes_are_the_librarys(tmp_path):
    arrays = ARRAYS | {f"of {name}": RNG.integers(0, 2, (2, 3)).astype(dtype) for name, dtype in DTYPES.items()}
    write_safetensors(tmp_path / "w", arrays)
    assert (tmp_path / "w").read_bytes() == safetensors.numpy.save(arrays)
    assert_reads(open_tensors(tmp_path / "w"), arrays)


def test_big_endian_and_strided_arrays_are_written_right(tmp_path):
    array = ARRAYS["b/kernel"].astype(">f4")[::2].T
    for write in (write_safetensors, write_npz):
        write(tmp_path / "w", {"x": array})
        assert_reads(open_tensors(tmp_path / "w"), {"x": array.astype("<f4")})


def parts(size):
    return [slice(None), slice(1, size - 1), slice(-2, None), slice(0, size, 2), slice(3, 3), slice(1, 99, 3)]


@pytest.mark.parametrize("buffer, gap", [(8 << 20, 16 << 10), (64, 8), (16, 0), (64, 1 << 20)])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_any_slice_of_any_order_is_numpys(tmp_path, monkeypatch, buffer, gap, order):
    """Through each way of reading: at once, over small gaps, row by row."""
    monkeypatch.setattr(stored, "_BUFFER", buffer)
    monkeypatch.setattr(stored, "_GAP", gap)
    whole = RNG.standard_normal((5, 7, 6)).astype(np.float32)
    (tmp_path / "w").write_bytes(b"offset" + whole.tobytes())
    view = whole.transpose(order)
    file = stored.regular_file(tmp_path / "w")
    tensor = stored.stored_tensor(file, "w", whole.dtype, view.shape, 6, view.strides)
    for first in parts(view.shape[0]):
        np.testing.assert_array_equal(tensor.read((first,)), view[first])
        for second in parts(view.shape[1]):
            for third in parts(view.shape[2]):
                index = (first, second, third)
                np.testing.assert_array_equal(tensor.read(index), view[index])


def test_what_is_no_slice_of_it(tmp_path):
    write_safetensors(tmp_path / "w", ARRAYS)
    tensor = open_tensors(tmp_path / "w").tensors["a"]
    for index in [(slice(None),) * 3, (slice(None, None, -1),)]:
        with pytest.raises(ValueError, match=r"of a tensor \(4, 6\)"):
            tensor.read(index)


def sparse_file(path, shape):
    """A safetensors file of zeros that takes no disk."""
    size = int(np.prod(shape)) * 4
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        out.truncate(8 + len(header) + size)
    return open_tensors(path).tensors["w"]


@pytest.mark.parametrize("index", [np.s_[:16], np.s_[:, :64], np.s_[::64], np.s_[:, 5:6]])
def test_a_slice_takes_its_own_memory(tmp_path, index):
    tensor = sparse_file(tmp_path / "w", [1024, 65536])  # 256 MiB
    tracemalloc.start()
    array = tensor.read(index if isinstance(index, tuple) else (index,))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert array.nbytes < 5e6 and peak < array.nbytes + 1e6


def test_a_slice_over_small_gaps_takes_a_buffer_more(tmp_path):
    tensor = sparse_file(tmp_path / "w", [8192, 2048])  # 64 MiB
    tracemalloc.start()
    array = tensor.read((slice(None), slice(0, 512)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert array.nbytes == 16 << 20 and peak < array.nbytes + 2 * stored._BUFFER


def header_file(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "header, message",
    [
        ({"w": entry(dtype="F4")}, "has dtype F4; expected one of"),
        ({"w": entry(dtype=["F32"])}, "expected one of"),
        ({"w": entry(dtype="F64")}, r"F64\[2\] needs 16 bytes; the header gives it \[0, 8\]"),
        ({"w": entry(shape=[3])}, "needs 12 bytes"),
        ({"w": entry(shape=[-2])}, "expected integers of 0 or more"),
        ({"w": entry(shape=[2.0])}, "expected integers of 0 or more"),
        ({"w": entry(shape=[True, 2])}, "expected integers of 0 or more"),
        ({"w": entry(shape=2)}, "expected two lists of integers"),
        ({"w": entry(shape=[1 << 70, 0], offsets=[0, 0])}, "that no array can have"),
        ({"w": entry(shape=[1] * 1000)}, "shape of 1000 axes"),
        ({"w": entry(offsets=[0])}, "expected two lists of integers"),
        ({"w": entry(offsets=[-8, 0])}, "needs 8 bytes"),
        ({"w": entry(offsets=[8, 0])}, "needs 8 bytes"),
        ({"w": entry(offsets=[0, 1 << 60])}, "needs 8 bytes"),
        ({"w": entry(offsets=[4, 12])}, "begins at byte 4 of the data, the one before ends at 0"),
        ({"v": entry(), "w": entry(offsets=[4, 12])}, "neither overlaps nor holes"),
        ({"v": entry(), "w": entry(offsets=[8, 16])}, "has .* bytes, its header describes .*truncated"),
        ({}, "truncated or damaged"),
        ({"w": {"dtype": "F32"}}, "expected dtype, shape and data_offsets"),
        ({"w": 3}, "expected dtype, shape and data_offsets"),
        ({"__metadata__": {"a": 1}}, "expected an object of strings"),
        ({"__metadata__": [1]}, "expected an object of strings"),
        (b'{"w": {}, "w": {}}', "a name stands there twice"),
        (b"{" * 40, "not the JSON of safetensors"),
        (b'{"a":' * 50_000, "not the JSON of safetensors"),
        (b'{"\xff": 1}', "not the JSON of safetensors"),
        (b'{"w": ' + b"9" * 5000 + b"}", "not the JSON of safetensors"),
    ],
)
def test_headers_that_lie(tmp_path, header, message):
    with pytest.raises(UserError, match=message) as error:
        open_tensors(header_file(tmp_path / "w", header, bytes(8)))
    assert "\n" not in str(error.value) and len(str(error.value)) < 800


@pytest.mark.parametrize("length", [10_000_000_000, 100_000_001, 1 << 55, 1000])
def test_a_header_of_10_gb_is_refused_before_it_is_read(tmp_path, length):
    path = header_file(tmp_path / "w", {"w": entry()}, bytes(8), length)
    tracemalloc.start()
    with pytest.raises(UserError, match=f"claims a header of {length:,} bytes"):
        open_tensors(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6


def test_a_file_of_100_mb_and_more_may_not_be_all_header(tmp_path):
    path = header_file(tmp_path / "w", b"{", length=200_000_000)
    os.truncate(path, 300_000_000)
    with pytest.raises(UserError, match="expected at most 100,000,000"):
        open_tensors(path)


@pytest.mark.parametrize("write", [write_safetensors, write_npz])
def test_a_file_that_changes_meanwhile_is_not_read(tmp_path, write):
    write(tmp_path / "w", {"x": np.ones(1000)})
    tensor = open_tensors(tmp_path / "w").tensors["x"]
    write(tmp_path / "w", {"x": np.ones(10)})
    with pytest.raises(UserError, match="was changed while it was being read"):
        tensor.read()
    os.unlink(tmp_path / "w")
    with pytest.raises(UserError, match="cannot be read: No such file"):
        tensor.read()


# writing


@pytest.mark.parametrize("write", [write_safetensors, write_npz])
def test_writing_holds_one_array_at_a_time(tmp_path, write):
    alive = []

    def load(index, value):
        assert all(reference() is None for reference in alive)
        array = np.full((100, 10), value, np.float32)
        alive.append(weakref.ref(array))
        return array

    lazy = {f"{i}": Tensor((100, 10), np.dtype("f4"), lambda index, i=i: load(index, i)) for i in range(3)}
    write(tmp_path / "w", lazy)
    assert len(alive) == 3
    assert_reads(open_tensors(tmp_path / "w"), {name: np.full((100, 10), int(name), np.float32) for name in lazy})


@pytest.mark.parametrize("write", [write_safetensors, write_npz])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, write):
    write(tmp_path / "w", {"x": np.ones(3)})
    before = (tmp_path / "w").read_bytes()
    broken = Tensor((3,), np.dtype("f4"), lambda index: np.ones(4, np.float32))
    with pytest.raises(ValueError, match=r"`y` came as float32\(4,\); expected float32\(3,\)"):
        write(tmp_path / "w", {"x": np.zeros(3), "y": broken})
    assert (tmp_path / "w").read_bytes() == before and os.listdir(tmp_path) == ["w"]


def test_what_a_format_cannot_hold(tmp_path):
    with pytest.raises(UserError, match="safetensors cannot hold `x` complex128"):
        write_safetensors(tmp_path / "w", {"x": np.zeros(1, complex)})
    with pytest.raises(UserError, match="metadata of safetensors is strings only"):
        write_safetensors(tmp_path / "w", {}, {"steps": 3})
    for array in (np.zeros(1, ml_dtypes.float8_e5m2), np.array(["a"])):
        with pytest.raises(UserError, match="an npz cannot hold `x`"):
            write_npz(tmp_path / "w", {"x": array})
    assert not os.listdir(tmp_path)


# shards


def write_shards(folder, symlinked=False):
    """Two shards and their index; symlinked as in the Hugging Face cache: snapshots/x/NAME -> ../../blobs/HASH."""
    snapshot = folder / "snapshots" / "x"
    blobs = folder / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    shards = {
        "model-1.safetensors": ["b/kernel", "a"],
        "model-2.safetensors": ["scalar", "empty", "ids", "mask", "é \n"],
    }
    index = {"metadata": {"total_size": 1}, "weight_map": {name: shard for shard in shards for name in shards[shard]}}
    for shard, names in shards.items():
        write_safetensors(blobs / shard[6], {name: ARRAYS[name] for name in names}, {"format": "pt"})
    (blobs / "index").write_text(json.dumps(index, indent=2))
    for name, blob in {**{shard: shard[6] for shard in shards}, "model.safetensors.index.json": "index"}.items():
        if symlinked:
            (snapshot / name).symlink_to(f"../../blobs/{blob}")
        else:
            (blobs / blob).rename(snapshot / name)
    return snapshot / "model.safetensors.index.json"


@pytest.mark.parametrize("symlinked", [False, True])
def test_shards_are_one_file(tmp_path, symlinked):
    file = open_tensors(write_shards(tmp_path, symlinked))
    assert file.kind == "safetensors" and file.metadata == {"format": "pt", "total_size": 1}
    assert_reads(file, ARRAYS)


def test_shards_of_torch(tmp_path):
    (tmp_path / "1.bin").write_bytes(zip_bytes({"epoch": 1}, {}))
    (tmp_path / "i.json").write_text('{"weight_map": {"w": "1.bin"}}')
    with pytest.raises(UserError, match=r"tensor `w` is not in 1\.bin"):
        open_tensors(tmp_path / "i.json")


@pytest.mark.parametrize(
    "shard, message",
    [
        ("../secret", "names the shard '../secret'; expected the name of a file in its own folder"),
        ("/etc/passwd", "names the shard '/etc/passwd'"),
        ("sub/w", "names the shard"),
        ("..", "names the shard"),
        ("", "names the shard"),
        ("a\\b", "names the shard"),
        ("w\0", "names the shard"),
        ("missing", "missing is not there"),
        ("dangling", "dangling is a symbolic link to a file that is not there"),
        ("loop", "loop is a symbolic link in a loop"),
        ("folder", "folder is a folder"),
        ("zero", "zero is a character device"),
        ("pipe", "pipe is a pipe"),
        ("i.json", "no file of tensors"),
        ("other", "tensor `w` is not in other"),
        ("x" * 5000, "File name too long"),
        (3, 'without a "weight_map"'),
    ],
)
def test_an_index_that_leads_elsewhere(tmp_path, shard, message):
    folder = tmp_path / "model"
    folder.mkdir()
    write_safetensors(tmp_path / "secret", {"w": np.zeros(1)})
    write_safetensors(folder / "other", {"v": np.zeros(1)})
    (folder / "dangling").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    (folder / "folder").symlink_to("..")
    (folder / "zero").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe")
    (folder / "i.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(UserError, match=message):
        open_tensors(folder / "i.json")
    if isinstance(shard, str) and shard.isalpha() and len(shard) < 100:
        with pytest.raises(UserError, match=message) if shard != "other" else pytest.raises(KeyError):
            open_tensors(folder / shard).tensors["w"]


# other files


def tar_bytes():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("sys_info"))
    return out.getvalue()


def zip_of(*names):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return out.getvalue()


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"\0", "no file of tensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git LFS pointer.*git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "an HTML page.*a login or error page"),
        (b"<html>", "an HTML page"),
        (b"hello", r"no file of tensors \(it begins with b'hello'\)"),
        (b'{"model_type": "clip"}', 'JSON without a "weight_map"'),
        (b'{"abcd":{"weight_map": {}}}', 'JSON without a "weight_map"'),
        (b'{"weight_map": {}}', 'JSON without a "weight_map"'),
        (b'{"weight_map": ', "damaged JSON"),
        (b'{"a":' * 50_000, "damaged JSON"),
        (b"[1]", "no file of tensors"),
        (b"\x93NUMPY\x01\0", "a single array of numpy.*np.savez"),
        (tar_bytes(), "a tar archive"),
        (b"\x1f\x8b\x08", "packed with gzip"),
        (b"GGUF\x03", "a GGUF file"),
        (b"\x89HDF\r\n", "an HDF5 file"),
        (zip_of(), "a zip archive without tensors"),
        (zip_of("word/document.xml"), "a zip archive without tensors"),
        (zip_of("a.npy")[:-30], "truncated or damaged zip archive"),
        (
            b"\x80\x04\x95\x0b\0\0\0\0\0\0\0\x8c\x05hello\x94.",
            "holds a damaged pickle, or one that torch did not write",
        ),
        (b"\x80\x02K\x01.\x80\x02K\x01.\x80\x02K\x01.", "a pickle, but none that torch.save wrote"),
    ],
    ids=lambda value: value if isinstance(value, str) else "data",  # zip archives hold the time
)
def test_what_is_no_file_of_tensors_is_said(tmp_path, data, message):
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        open_tensors(tmp_path / "model.safetensors")
    assert "expected" in str(error.value) or "download it again" in str(error.value)


def test_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match="w is not there; expected a file of tensors"):
        open_tensors(tmp_path / "w")
    with pytest.raises(UserError, match="is a folder"):
        open_tensors(tmp_path)
