"""Pictures in folders."""

import pytest

from tests.support.records import red, red_of
from vlm_jax.data.sources import open_source, train_split_of
from vlm_jax.errors import UserError


def test_folder(tmp_path):
    for split, names in (
        ("train", ("cat/1.png", "cat/deep/2.PNG", "dog/3.jpg", "dog/note.txt")),
        ("val", ("dog/4.png",)),
    ):
        for name in names:
            path = tmp_path / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(red(int(path.stem)) if path.stem.isdigit() else b"")
    source = open_source(f"folder:{tmp_path}", "train")
    assert len(source) == 3 and source.classes == ["cat", "dog"]
    assert [source[i]["label"] for i in range(3)] == [0, 0, 1]
    assert source[2]["text"] == "dog" and red_of(source[2]["image"]) == 3
    assert source.key(1) == "cat/deep/2.PNG"
    flat = open_source(f"folder:{tmp_path}/val/dog")
    assert set(flat[0]) == {"image"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no pictures"):
        open_source(f"folder:{tmp_path}/empty")


def write(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(red(1))
    return f"folder:{root}"


def labels(source):
    return {source[i]["text"]: source[i]["label"] for i in range(len(source))}


def test_a_folder_without_splits(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "all" / name).mkdir(parents=True)
        (tmp_path / "both" / "train" / name).mkdir(parents=True)
    with pytest.raises(UserError, match=r"has no split `test`: .* it has cat, dog; leave the split out"):
        open_source(f"folder:{tmp_path}/all", "test")
    with pytest.raises(UserError, match=r"has no split `test`: there is no `.*/both/test`; it has train$"):
        open_source(f"folder:{tmp_path}/both", "test")
    assert train_split_of(f"folder:{tmp_path}/all?allow_outside", "train") is None
    assert train_split_of(f"folder:{tmp_path}/both", "train") == train_split_of("tfds:emoji", "train") == "train"
    for uri, meant in ((f"{tmp_path}/all", f"folder:{tmp_path}/all"), ("a.CSV", "csv:a.CSV"), ("foldr:a", "folder:a")):
        with pytest.raises(UserError, match=f"has no known scheme; .*did you mean `{meant}`"):
            open_source(uri)


def test_numbers_are_labels(tmp_path):
    source = open_source(write(tmp_path / "a", *(f"{i}/x.png" for i in (0, 1, 2, 9, 10, 11, 103))))
    assert labels(source) == {str(i): i for i in (0, 1, 2, 9, 10, 11, 103)}
    assert source.classes == ["0", "1", "2", "9", "10", "11", "103"]
    assert source.label_names("label")[103] == "103" and source.label_names("text") is None
    assert labels(open_source(write(tmp_path / "b", "007/x.png", "012/x.png"))) == {"007": 7, "012": 12}
    mixed = open_source(write(tmp_path / "c", "2/x.png", "10/x.png", "other/x.png", "99999999999/x.png"))
    assert labels(mixed) == {"2": 0, "10": 1, "99999999999": 2, "other": 3}, "numbers beyond int32 are names"
    with pytest.raises(UserError, match="the folders `07` and `7` are one number; rename one"):
        open_source(write(tmp_path / "d", "7/x.png", "07/x.png"))


def test_the_classes_are_those_of_all_splits(tmp_path):
    uri = write(tmp_path, "train/b/1.png", "train/c/1.png", "val/a/deep/1.png", "val/c/1.png")
    write(tmp_path, "notes/d/1.txt", ".git/e/1.png")
    (tmp_path / "val" / "empty").mkdir()
    assert labels(open_source(uri, "train")) == {"b": 1, "c": 2}
    assert labels(open_source(uri, "val")) == {"a": 0, "c": 2}
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "val").rename(tmp_path / "elsewhere" / "val")
    (tmp_path / "linked").symlink_to(tmp_path / "elsewhere" / "val")
    assert (
        labels(open_source(uri, "linked")) == labels(open_source(uri, "linked"))
        and open_source(uri, "train").classes[0] == "a"
    )


def test_hidden_files_and_folders_do_not_count(tmp_path):
    uri = write(tmp_path, "a/1.png", "b/1.png", "a/._1.png", "a/.DS_Store", ".ipynb_checkpoints/2.png")
    write(tmp_path, "a/.ipynb_checkpoints/3.png", "__MACOSX/a/1.png", "a/@eaDir/1.png/thumb.jpg", ".x.png", "a/.png")
    (tmp_path / "b" / "folder.png").mkdir()
    source = open_source(uri)
    assert [source.key(i) for i in range(len(source))] == ["a/1.png", "b/1.png"] and source.classes == ["a", "b"]


def test_a_linked_folder_is_said(tmp_path, caplog):
    uri = write(tmp_path / "data", "a/1.png")
    (tmp_path / "data" / "b").symlink_to(tmp_path / "data" / "a")
    assert len(open_source(uri)) == 1
    assert "b is a link to a folder; its pictures are left out" in caplog.text
