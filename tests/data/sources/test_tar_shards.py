"""Tar shards, as the tools that write them do."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest

from tests.support.records import red, red_of
from vlm_jax.data.source import BadExample
from vlm_jax.data.sources import open_source, select, tar_shards
from vlm_jax.errors import UserError


def write_shard(path, samples, format=tarfile.PAX_FORMAT, mtime=1.5, directory=False):
    """Writes {key: {extension: bytes}} as webdataset's TarWriter (float mtime: a pax header each) or GNU tar does."""
    with tarfile.open(path, "w", format=format) as tar:
        if directory:
            entry = tarfile.TarInfo("a/")
            entry.type = tarfile.DIRTYPE
            tar.addfile(entry)
        for key, members in samples.items():
            for extension, data in members.items():
                entry = tarfile.TarInfo(f"{key}.{extension}")
                entry.size, entry.mtime = len(data), mtime
                tar.addfile(entry, io.BytesIO(data))


def sample(i):
    meta = json.dumps({"caption": f"caption {i}", "width": i}).encode()
    return {"jpg": red(i), "txt": f"caption {i}".encode(), "json": meta}


def test_wds_reads_what_img2dataset_writes(tmp_path):
    for shard in range(3):
        write_shard(tmp_path / f"{shard:05d}.tar", {f"{shard:05d}{i:04d}": sample(10 * shard + i) for i in range(4)})
    source = open_source(f"wds:{tmp_path}/{{00000..00002}}.tar")
    assert len(source) == 12
    for i in (11, 0, 5):
        record = source[i]
        n = 10 * (i // 4) + i % 4
        assert red_of(record["image"]) == n
        assert record["txt"] == f"caption {n}"
        assert record["json"] == {"caption": f"caption {n}", "width": n}
    assert source.key(5) == "00001.tar/000010001"
    copy = pickle.loads(pickle.dumps(source))
    assert copy[7] == source[7]
    np.testing.assert_array_equal(select(source, {"json/width": (2, 13, 99)}), [2, 7])


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_wds_reads_every_tar_dialect_and_long_names(tmp_path, format):
    key = "/".join(["folder" * 5] * 4) + "/picture" if format == tarfile.USTAR_FORMAT else "f" * 150 + "/äö" + "n" * 60
    members = {"cls": b"7", "webp": red(3), "seg.png": b"mask"}
    write_shard(tmp_path / "a.tar", {key: members, "b": {"png": red(4)}}, format, mtime=1, directory=True)
    source = open_source(f"wds:{tmp_path}/*.tar")
    assert len(source) == 2
    record = source[0]
    assert source.key(0) == f"a.tar/{key}"
    assert record["cls"] == 7 and red_of(record["image"]) == 3 and record["seg.png"] == b"mask"
    with tarfile.open(tmp_path / "a.tar") as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]
    assert list(tar_shards.scan(str(tmp_path / "a.tar"))) == expected


def test_wds_errors_name_the_shard(tmp_path):
    for name in ("0", "2"):
        write_shard(tmp_path / f"{name}.tar", {"a": sample(1), "b": sample(2)})
    with pytest.raises(UserError, match=r"shard `.*/1\.tar` is missing \(1 of 3 are\)"):
        open_source(f"wds:{tmp_path}/{{0..2}}.tar")
    with pytest.raises(UserError, match="none matches"):
        open_source(f"wds:{tmp_path}/x*.tar")
    whole = (tmp_path / "0.tar").read_bytes()
    for length in (5300, 5000, 700):
        (tmp_path / "1.tar").write_bytes(whole[:length])
        with pytest.raises(UserError, match=rf"shard `.*/1\.tar` is cut short: it has {length} bytes"):
            open_source(f"wds:{tmp_path}/{{0..2}}.tar")
    (tmp_path / "1.tar").write_bytes(b"\x1f\x8b" + whole)
    with pytest.raises(UserError, match=r"1\.tar` is compressed"):
        open_source(f"wds:{tmp_path}/1.tar")
    (tmp_path / "1.tar").write_bytes(b"something else" * 100)
    with pytest.raises(UserError, match=r"1\.tar` is not a tar file"):
        open_source(f"wds:{tmp_path}/1.tar")
    write_shard(tmp_path / "1.tar", {"a": {"json": b"{", "jpg": red(1)}})
    with pytest.raises(BadExample, match=r"member \.json cannot be read"):
        open_source(f"wds:{tmp_path}/1.tar")[0]


def test_brace_expansion():
    assert tar_shards.expand("a{08..11}b") == ["a08b", "a09b", "a10b", "a11b"]
    assert tar_shards.expand("{x,y}-{0..1}") == ["x-0", "x-1", "y-0", "y-1"]
    assert tar_shards.expand("plain") == ["plain"]
