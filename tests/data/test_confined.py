"""Files that a data set names: inside of its folder, regular, of a bounded size."""

import os

import pytest

from vlm_jax.data import confined
from vlm_jax.data.source import BadExample
from vlm_jax.data.sources import open_source
from vlm_jax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """A folder with a file, a FIFO, a device's link, links; beside it a secret."""
    root = tmp_path / "data"
    (root / "in").mkdir(parents=True)
    (root / "in" / "a.png").write_bytes(b"a")
    (tmp_path / "secret.png").write_bytes(b"secret")
    os.mkfifo(root / "fifo.png")
    os.symlink("/dev/zero", root / "zero.png")
    os.symlink("in/a.png", root / "link.png")
    os.symlink("../secret.png", root / "out.png")
    os.symlink("..", root / "up")
    os.symlink("gone.png", root / "broken.png")
    return root


@pytest.mark.parametrize("name", ["in/a.png", "link.png", "in/../in/a.png", "./in//a.png", "{root}/in/a.png"])
def test_inside(folder, name):
    assert confined.read(folder, name.format(root=folder)) == b"a"


@pytest.mark.parametrize(
    "name", ["../secret.png", "out.png", "up/secret.png", "in/../../secret.png", "{root}/../secret.png"]
)
def test_outside(folder, name):
    name = name.format(root=folder)
    with pytest.raises(BadExample, match=r"is outside of .*data; move it inside, or allow it"):
        confined.read(folder, name)
    assert confined.read(folder, name, allow_outside=True) == b"secret"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("fifo.png", "is a FIFO"), ("in", "is a folder"), ("zero.png", "outside"), ("/dev/zero", "outside"),
        ("none.png", "No such file"), ("broken.png", "No such file"), ("a\0.png", "is no path"),
        ("\ud800.png", "is no path"), ("x" * 999, "too long"), ("", "is a folder"),
    ],
)  # fmt: skip
def test_refused(folder, name, reason, monkeypatch):
    with pytest.raises(BadExample, match=reason) as error:
        confined.read(folder, name)
    assert error.value.kind == "file"
    if name == "zero.png":
        with pytest.raises(BadExample, match="is a device"):
            confined.read(folder, name, allow_outside=True)
    monkeypatch.setattr(confined, "MAX_BYTES", 0)
    with pytest.raises(BadExample, match="has 1 bytes, more than 0"):
        confined.read(folder, "in/a.png")


@pytest.mark.parametrize("scheme", ["jsonl", "csv"])
def test_a_table_is_a_file(folder, scheme):
    for name, what in (("fifo.png", "a FIFO"), ("in", "a folder"), ("zero.png", "a device")):
        with pytest.raises(UserError, match=f"is {what}; expected a file"):
            open_source(f"{scheme}:{folder / name}")
    with pytest.raises(UserError, match="is no path"):
        open_source(f"{scheme}:{folder}/a\0b")


def test_pictures_of_tables_and_folders_stay_inside(folder):
    (folder / "t.jsonl").write_text('{"image": "in/a.png"}\n{"image": "../secret.png"}\n{"image": "out.png"}\n')
    source = open_source(f"jsonl:{folder}/t.jsonl")
    assert source[0]["image"] == b"a"
    for i in (1, 2):
        with pytest.raises(BadExample, match="is outside of"):
            source[i]
    pictures = open_source(f"folder:{folder}")
    with pytest.raises(BadExample, match="is outside of"):
        pictures[pictures.files.index("out.png")]
    assert [open_source(f"jsonl:{folder}/t.jsonl?allow_outside")[i]["image"] for i in (1, 2)] == [b"secret"] * 2


def test_fingerprints(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 100_000)
    before = confined.fingerprint([tmp_path / "a"])
    for content in (b"x" * 99_999, b"y" + b"x" * 99_999, b"x" * 99_999 + b"y"):
        (tmp_path / "a").write_bytes(content)
        assert confined.fingerprint([tmp_path / "a"]) != before
    assert confined.digest(b"ab", b"c") != confined.digest(b"a", b"bc")
