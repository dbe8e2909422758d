"""Files that are written whole or not at all, and read although damaged."""

import errno
import json
import os

import pytest

from vlm_jax.data.files import inside, read_json, read_jsonl, read_kept, replacing, write_json
from vlm_jax.data.package_files import locate
from vlm_jax.errors import UserError, told


def test_a_failure_leaves_the_old_file_and_names_the_path(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    with pytest.raises(OSError) as error, replacing(path) as out:
        out.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # a full disk names no file
    assert told(error.value) == (f"No space left on device ({path})", 2)
    assert read_json(path) == {"a": 1} and os.listdir(tmp_path) == ["results.json"]


def test_what_is_written_is_on_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}")))
    write_json(tmp_path / "a.json", {})
    assert [path.rsplit("/", 1)[1].startswith("a.json.") for path in synced] == [True, False]  # the file, the folder


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, "\0\0\0", '{"a": "\udc80"}'])
def test_a_damaged_file_of_a_run_is_left_out_and_said(text, tmp_path, caplog):
    path = tmp_path / "results.json"
    assert read_kept(path) is None and not caplog.messages
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert read_kept(path) is None
    assert f"{path}" in caplog.messages[0] and "left out and written anew" in caplog.messages[0]


def test_damaged_lines_of_metrics_are_left_out_and_said(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    good = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    bad = [
        b"3",
        b'{"loss": 1}',
        b'{"step": "3"}',
        b'{"step": 3, "loss": [1]}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"st',
        b"\0" * 9,
    ]
    path.write_bytes(b"\n".join([json.dumps(good[0]).encode(), bad[0], json.dumps(good[1]).encode(), *bad[1:]]))
    assert read_jsonl(path) == good
    assert f"{path}: 8 damaged lines of 10 are left out" in caplog.messages


@pytest.mark.parametrize("name", ["/etc/passwd", "../b.txt", "c/../../b.txt", "link", "a\0b"])
def test_names_in_a_folder_s_own_files_stay_inside(name, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "b.txt").write_text("secret")
    (folder / "link").symlink_to("../b.txt")
    with pytest.raises(UserError, match=r"names the file|outside of the folder"):
        inside(folder, name)
    assert inside(folder, "vocab.txt") == folder / "vocab.txt"


def test_links_into_the_cache_of_the_hub_are_followed(tmp_path):
    folder = tmp_path / "models--a--b" / "snapshots" / "0"
    folder.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "1").write_text("")
    (folder / "vocab.txt").symlink_to("../../blobs/1")
    assert inside(folder, "vocab.txt") == folder / "vocab.txt"


def test_a_package_is_found_without_being_imported(tmp_path, monkeypatch):
    (tmp_path / "hostile" / "part").mkdir(parents=True)
    for package in (tmp_path / "hostile", tmp_path / "hostile" / "part"):
        (package / "__init__.py").write_text("raise SystemExit('this ran')")
    monkeypatch.syspath_prepend(tmp_path)
    assert locate("pkg:hostile/model") == tmp_path / "hostile" / "model"
    assert locate("pkg:hostile.part/model") == tmp_path / "hostile" / "part" / "model"
    with pytest.raises(UserError, match=r"there is no package `hostile\.other`"):
        locate("pkg:hostile.other/model")
    for path in ("pkg:hostile/../x", "pkg:hostile//etc/passwd"):
        with pytest.raises(UserError, match="leaves the package"):
            locate(path)
    for path in ("pkg:", "pkg:/x", "pkg:..x/y", "pkg:a b/c", "pkg:os/x", "pkg:__main__/x"):
        with pytest.raises(UserError, match=r"is no name of a package|there is no package"):
            locate(path)
