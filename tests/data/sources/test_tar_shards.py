"""Tar shards, as the tools that write them do."""

import io
import json
import os
import pickle
import tarfile

import numpy as np
import pytest

from tests.support.records import red, red_of
from vlm_jax.data.source import BadExample
from vlm_jax.data.sources import open_source, select, tar_headers, tar_shards
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
    assert list(tar_headers.scan(str(tmp_path / "a.tar"))) == expected


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


def pack(path, *members, format=tarfile.USTAR_FORMAT, end=True):
    """Writes members (name, bytes) in this order; without `end`, appends nothing after them."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return f"wds:{path}"


A, B = red(1), red(2)


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        (["0.png A", "0.txt a", "0.png B", "0.txt b"], [(1, "a"), (2, "b")]),
        (["0.png A", "0.txt a", "1.png B", "1.txt b", "0.png A", "0.txt a"], [(1, "a"), (2, "b"), (1, "a")]),
        (["0.png A", "0.txt old", "0.txt a"], [None, None]),
        (["0.png A", "0.txt a", "0.jpg B", "0.txt b"], [None, None]),
        (["0.png A", "0.png B", "0.txt b"], [None, None]),
        (["0.png A", "0.txt old", "1.png B", "1.txt b", "0.txt a"], [None, (2, "b"), None]),
        (["0.png A", "0.TXT old", "0.txt a"], [None, None]),
    ],
)
def test_a_key_that_comes_again_gives_no_picture_the_text_of_another(tmp_path, members, expected):
    content = {"A": A, "B": B}
    named = ((name, content.get(data, data.encode())) for name, data in map(str.split, members))
    source = open_source(pack(tmp_path / "a.tar", *named))
    assert len(source) == len(expected)
    for i, pair in enumerate(expected):
        if pair is None:
            with pytest.raises(BadExample, match="the key comes again with other members"):
                source[i]
        else:
            assert (red_of(source[i]["image"]), source[i]["txt"]) == pair


def test_what_belongs_to_no_record_is_counted(tmp_path):
    hidden = ("./.DS_Store", "__meta__/info.json", "__index__", "./._0.png", "__MACOSX/._0.txt", "README", "Thumbs.db")
    pack(tmp_path / "0.tar", *((name, b"x") for name in hidden), ("./0.png", A), ("./0.txt", b"a"))
    pack(tmp_path / "1.tar")
    (tmp_path / "2.tar").touch()
    with tarfile.open(tmp_path / "3.tar", "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            entry = tarfile.TarInfo(f"1{kind.decode()}.png")
            entry.type, entry.linkname = kind, "/etc/passwd"
            tar.addfile(entry)
        entry = tarfile.TarInfo("1.png")
        entry.size = len(B)
        tar.addfile(entry, io.BytesIO(B))
    source = open_source(f"wds:{tmp_path}/{{0..3}}.tar")
    assert [source.key(i) for i in range(len(source))] == ["0.tar/0", "3.tar/1"]
    assert source.left_out == {"members of no record": 7, "empty shards": 2, "links, devices and sparse members": 4}


def test_names_that_are_not_utf_8_stay_apart(tmp_path):
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=format, encoding="latin-1") as tar:
            for letter in ("é", "ü"):
                for extension, data in (("png", A), ("txt", letter.encode())):
                    entry = tarfile.TarInfo(f"{letter * 120}.{extension}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
        source = open_source(f"wds:{tmp_path}/a.tar")
        assert [source[i]["txt"] for i in range(2)] == ["é", "ü"]


def header(name=b"0.txt", size=b"00000000004\0", kind=b"0", body=b"text"):
    block = bytearray(512)
    block[:100], block[124:136], block[156:157], block[257:265] = name.ljust(100, b"\0"), size, kind, b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + body.ljust(-(-len(body) // 512) * 512, b"\0")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(kind=b"x", body=b"0 path=a\n", size=b"00000000011\0"), "damaged: pax records"),
        (header(kind=b"x", body=b"-9 path=a\n", size=b"00000000012\0"), "damaged: pax records"),
        (header(kind=b"x", body=b"99999999999999999999 path=a\n", size=b"00000000034\0"), "damaged: pax records"),
        (header(kind=b"x", body=b"12 size=-512\n", size=b"00000000015\0"), "damaged"),
        (header(kind=b"x", body=b"13 size=-512\n", size=b"00000000015\0") + header(), "damaged: no size"),
        (header(kind=b"x", body=b"16 size=99999999\n"[:16], size=b"00000000020\0") + header(), "damaged"),
        (header(size=b"-0000001000\0"), "damaged: no size"),
        (header(size=b"\xff" * 12), "damaged: no size"),
        (header(size=b"\x80" + b"\x7f" * 11), "is cut short"),
        (header(size=b"77777777777\0"), "is cut short"),
        (header(kind=b"L", size=b"77777777777\0"), "is cut short"),
        (header(kind=b"L", size=b"00010000001\0", body=b"x" * (2**21 + 512)), "bytes of names"),
        (b"\x80" * 2048, "is not a tar file"),
        (header()[:148] + b"99999999" + header()[156:], "is not a tar file"),
        (header() * 2 + header(size=b"77777777777\0", name=b"1.txt").replace(b"1.t", b"2.t"), "no header at byte 2048"),
    ],
)
def test_headers_of_a_stranger(tmp_path, content, message):
    (tmp_path / "a.tar").write_bytes(content + bytes(1024))
    with pytest.raises(UserError, match=message):
        open_source(f"wds:{tmp_path}/a.tar")


@pytest.mark.parametrize(
    "pattern", ["{0..99999999999}.tar", "{0..999}{0..999}.tar", "{a,b}" * 17, "{0..%s}" % ("9" * 400)]
)
def test_patterns_have_a_limit(pattern, monkeypatch):
    monkeypatch.setattr(tar_shards, "MAX_SHARDS", 1000)
    with pytest.raises(UserError, match=r"names more than|is missing"):
        open_source(f"wds:{pattern}")
    assert tar_shards.expand("{5..3}{0..999}{0..999}") == []
    assert tar_shards.expand("a{1,{2..3}}{x,y}") == ["a1x", "a1y", "a2x", "a2y", "a1x", "a1y", "a3x", "a3y"]


def test_a_shard_that_is_replaced_while_it_is_read(tmp_path):
    uri = pack(tmp_path / "a.tar", ("0.png", A), ("0.txt", b"a"))
    source = open_source(uri)
    pack(tmp_path / "a.tar", ("0.png", B), ("0.txt", b"b"))
    with pytest.raises(BadExample, match="was written to after it was opened"):
        source[0]
    assert open_source(uri).fingerprint() != source.fingerprint()
    (tmp_path / "a.tar").unlink()
    with pytest.raises(BadExample, match=r"a\.tar: No such file"):
        source[0]


def test_members_of_a_stranger_are_bad_examples(tmp_path):
    long = b"9" * 5000
    uri = pack(
        tmp_path / "a.tar", ("0.json", b"[" * 10**5), ("1.txt", b"\xff"), ("2.cls", long), ("3.json", b'"\\ud800"')
    )
    source = open_source(uri)
    for i in range(4):
        with pytest.raises(BadExample, match="cannot be read"):
            source[i]


def test_a_fifo_is_no_shard(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(UserError, match=r"a\.tar` is a FIFO \(1 of 1 are\)"):
        open_source(f"wds:{tmp_path}/a.tar")
