"""Pictures in folders."""

import pytest

from tests.support.records import red, red_of
from vlm_jax.data.sources import open_source
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
