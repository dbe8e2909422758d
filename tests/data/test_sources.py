"""Every source, against files written by the tools whose formats it reads."""

import csv
import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from vlm_jax.data import sources, wds
from vlm_jax.data.registry import BadExample
from vlm_jax.errors import UserError


def png(value):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def value_of(data):
    return Image.open(io.BytesIO(data)).getpixel((0, 0))[0]


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
    return {"jpg": png(i), "txt": f"caption {i}".encode(), "json": meta}


def test_wds_reads_what_img2dataset_writes(tmp_path):
    for shard in range(3):
        write_shard(tmp_path / f"{shard:05d}.tar", {f"{shard:05d}{i:04d}": sample(10 * shard + i) for i in range(4)})
    source = sources.open_source(f"wds:{tmp_path}/{{00000..00002}}.tar")
    assert len(source) == 12
    for i in (11, 0, 5):
        record = source[i]
        n = 10 * (i // 4) + i % 4
        assert value_of(record["image"]) == n
        assert record["txt"] == f"caption {n}"
        assert record["json"] == {"caption": f"caption {n}", "width": n}
    assert source.key(5) == "00001.tar/000010001"
    copy = pickle.loads(pickle.dumps(source))
    assert copy[7] == source[7]
    np.testing.assert_array_equal(sources.select(source, {"json/width": (2, 13, 99)}), [2, 7])


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_wds_reads_every_tar_dialect_and_long_names(tmp_path, format):
    key = "/".join(["folder" * 5] * 4) + "/picture" if format == tarfile.USTAR_FORMAT else "f" * 150 + "/äö" + "n" * 60
    members = {"cls": b"7", "webp": png(3), "seg.png": b"mask"}
    write_shard(tmp_path / "a.tar", {key: members, "b": {"png": png(4)}}, format, mtime=1, directory=True)
    source = sources.open_source(f"wds:{tmp_path}/*.tar")
    assert len(source) == 2
    record = source[0]
    assert source.key(0) == f"a.tar/{key}"
    assert record["cls"] == 7 and value_of(record["image"]) == 3 and record["seg.png"] == b"mask"
    with tarfile.open(tmp_path / "a.tar") as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]
    assert list(wds.scan(str(tmp_path / "a.tar"))) == expected


def test_wds_errors_name_the_shard(tmp_path):
    for name in ("0", "2"):
        write_shard(tmp_path / f"{name}.tar", {"a": sample(1), "b": sample(2)})
    with pytest.raises(UserError, match=r"shard `.*/1\.tar` is missing \(1 of 3 are\)"):
        sources.open_source(f"wds:{tmp_path}/{{0..2}}.tar")
    with pytest.raises(UserError, match="none matches"):
        sources.open_source(f"wds:{tmp_path}/x*.tar")
    whole = (tmp_path / "0.tar").read_bytes()
    for length in (5300, 5000, 700):
        (tmp_path / "1.tar").write_bytes(whole[:length])
        with pytest.raises(UserError, match=rf"shard `.*/1\.tar` is cut short: it has {length} bytes"):
            sources.open_source(f"wds:{tmp_path}/{{0..2}}.tar")
    (tmp_path / "1.tar").write_bytes(b"\x1f\x8b" + whole)
    with pytest.raises(UserError, match=r"1\.tar` is compressed"):
        sources.open_source(f"wds:{tmp_path}/1.tar")
    (tmp_path / "1.tar").write_bytes(b"something else" * 100)
    with pytest.raises(UserError, match=r"1\.tar` is not a tar file"):
        sources.open_source(f"wds:{tmp_path}/1.tar")
    write_shard(tmp_path / "1.tar", {"a": {"json": b"{", "jpg": png(1)}})
    with pytest.raises(BadExample, match=r"member \.json cannot be read"):
        sources.open_source(f"wds:{tmp_path}/1.tar")[0]


def test_brace_expansion():
    assert wds.expand("a{08..11}b") == ["a08b", "a09b", "a10b", "a11b"]
    assert wds.expand("{x,y}-{0..1}") == ["x-0", "x-1", "y-0", "y-1"]
    assert wds.expand("plain") == ["plain"]


def test_jsonl(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(png(9))
    rows = [{"image": "images/0.png", "title": "äpfel", "n": 1}, {"image": "images/none.png"}, {"title": "no image"}]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n{broken\n[1]"
    (tmp_path / "data.jsonl").write_text(text, encoding="utf-8")
    source = sources.open_source(f"jsonl:{tmp_path}/data.jsonl")
    assert len(source) == 5
    record = source[0]
    assert value_of(record["image"]) == 9 and record["title"] == "äpfel" and record["n"] == 1
    assert source[2] == {"title": "no image"}
    for i, reason in ((1, r"none\.png: No such file"), (3, "not JSON"), (4, "is a JSON list")):
        with pytest.raises(BadExample, match=reason):
            source[i]
    assert source.key(1) == "data.jsonl:2"
    np.testing.assert_array_equal(sources.select(source, {"title": ("äpfel", "no image")}), [0, 2])
    assert source.narrow(frozenset({"title"}))[1] == {"image": "images/none.png"}


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_csv(tmp_path, delimiter):
    (tmp_path / "0.png").write_bytes(png(5))
    with open(tmp_path / "data.csv", "w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([["filepath", "title"], ["0.png", "one, two\nthree"], ["gone.png", "x"]])
    source = sources.open_source(f"csv:{tmp_path}/data.csv")
    assert len(source) == 2
    assert value_of(source[0]["image"]) == 5 and source[0]["title"] == "one, two\nthree"
    assert source.key(0) == "data.csv:2"
    with pytest.raises(BadExample, match=r"gone\.png"):
        source[1]


def test_folder(tmp_path):
    for split, names in (
        ("train", ("cat/1.png", "cat/deep/2.PNG", "dog/3.jpg", "dog/note.txt")),
        ("val", ("dog/4.png",)),
    ):
        for name in names:
            path = tmp_path / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(int(path.stem)) if path.stem.isdigit() else b"")
    source = sources.open_source(f"folder:{tmp_path}", "train")
    assert len(source) == 3 and source.classes == ["cat", "dog"]
    assert [source[i]["label"] for i in range(3)] == [0, 0, 1]
    assert source[2]["text"] == "dog" and value_of(source[2]["image"]) == 3
    assert source.key(1) == "cat/deep/2.PNG"
    flat = sources.open_source(f"folder:{tmp_path}/val/dog")
    assert set(flat[0]) == {"image"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no pictures"):
        sources.open_source(f"folder:{tmp_path}/empty")


@pytest.fixture(scope="module")
def emoji():
    return sources.open_source("tfds:emoji", "train")


def test_tfds_reads_the_embedded_data_set(emoji):
    record = emoji[3]
    assert isinstance(record["image"], bytes) and isinstance(record["concept"], int)
    assert isinstance(record["style"], str) and isinstance(record["name"]["en"], str)
    assert isinstance(record["keywords"]["en"], list) and isinstance(record["keywords"]["en"][0], str)
    assert emoji.key(3) == "tfds:emoji/train[3]"
    narrow = pickle.loads(pickle.dumps(emoji.narrow(frozenset({"image", "name/en", "concept", "nothing"}))))
    assert narrow[3] == {k: record[k] for k in ("image", "concept")} | {"name": {"en": record["name"]["en"]}}


def test_tfds_split_slices(emoji):
    tail = sources.open_source("tfds:emoji", "train[10:20]")
    assert len(tail) == 10 and tail[0]["image"] == emoji[10]["image"]


@pytest.mark.parametrize(
    ("uri", "split", "message"),
    [
        ("/data/x.tar", None, "has no known scheme; expected one of tfds:, wds:"),
        ("http://x", None, "has no known scheme"),
        ("jsonl:/no/such.jsonl", None, "there is no `/no/such.jsonl`"),
        ("csv:/no/such.csv", None, "there is no `/no/such.csv`"),
        ("folder:/no/such", None, "there is no `/no/such`"),
        ("wds:/no/such.tar", None, "shard `/no/such.tar` is missing"),
        ("wds:/no/such.tar", "train", "has no splits"),
        ("tfds:emoji", "test", "has no split `test`; it has"),
        ("tfds:emoji", None, "has no split `None`; it has"),
        ("tfds:no_such_set_at_all", "train", "cannot be opened"),
        ("tfds:/no/such", "train", "cannot be opened"),
    ],
)
def test_a_source_that_is_not_there_is_one_clear_line(uri, split, message):
    with pytest.raises(UserError) as error:
        sources.open_source(uri, split)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
