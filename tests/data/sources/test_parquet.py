"""Parquet files as datasets and img2dataset write them: rows in order, pictures of every kind, what is bad."""

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.pictures import write_pictures
from vlm_jax.data import loader
from vlm_jax.data.source import BadExample
from vlm_jax.data.sources import open_source
from vlm_jax.errors import UserError


@pytest.fixture
def pictures(tmp_path):
    write_pictures(tmp_path, 7)
    return [(tmp_path / f"{i}.jpg").read_bytes() for i in range(7)]


def write(path, rows, group=3):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)


def test_rows_of_several_files_in_order(pictures, tmp_path):
    """Two files of row groups of three, as Hugging Face's datasets write them: bytes, or a path beside the file."""
    rows = [
        {"image": {"bytes": data if i % 2 else None, "path": f"{i}.jpg"}, "text": f"picture {i}", "n": i, "tags": ["a"]}
        for i, data in enumerate(pictures)
    ]
    write(tmp_path / "a-0.parquet", rows[:5])
    write(tmp_path / "a-1.parquet", rows[5:])
    source = open_source(f"parquet:{tmp_path}/a-*.parquet")
    assert len(source) == 7
    order = np.random.default_rng(0).permutation(7).tolist()  # more row groups than are held
    assert [source[i]["image"] for i in order] == [pictures[i] for i in order]
    assert source[4] == {"image": pictures[4], "text": "picture 4", "n": 4, "tags": ["a"]}
    assert [source.key(i) for i in (4, 5)] == ["a-0.parquet:4", "a-1.parquet:0"]
    narrow = source.narrow(frozenset(["text"]))
    assert narrow[6] == {"text": "picture 6"} and pickle.loads(pickle.dumps(narrow))[2] == {"text": "picture 2"}
    assert source.narrow(frozenset(["image"]))[6] == {"image": pictures[6]}


@pytest.mark.parametrize("column", ["jpg", "image", "image_path"])
def test_pictures_in_a_column_of_any_name(column, pictures, tmp_path):
    values = [f"{i}.jpg" for i in range(7)] if column == "image_path" else pictures
    write(tmp_path / "a.parquet", [{column: value, "caption": "x"} for value in values])
    source = open_source(f"parquet:{tmp_path}/a.parquet").narrow(frozenset(["image", "caption"]))
    assert [source[i]["image"] for i in range(7)] == pictures and source[0]["caption"] == "x"


def test_a_run_reads_them(pictures, tmp_path):
    write(
        tmp_path / "a.parquet", [{"jpg": data, "text": None if i == 3 else str(i)} for i, data in enumerate(pictures)]
    )
    ops = "decode | resize(8) | caption('text') | keep('image', 'text')"
    batches = loader.eval_batches(uri=f"parquet:{tmp_path}/a.parquet", ops=ops, batch_size=7, max_bad_fraction=1.0)
    batch, bad = batches[0]
    assert batch["mask"].tolist() == [i != 3 for i in range(7)] and batch["image"].shape == (7, 8, 8, 3)
    assert [one.key for one in bad] == ["a.parquet:3"]


def test_what_cannot_be_read(pictures, tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    write(path, [{"jpg": data} for data in pictures])
    data = bytearray(path.read_bytes())
    source = open_source(f"parquet:{path}")
    data[4:2000] = bytes(1996)
    path.write_bytes(data)
    with pytest.raises(BadExample, match="row group 0 cannot be read"):
        source[0]
    path.write_bytes(data[:-4])
    with pytest.raises(UserError, match=r"a\.parquet cannot be read") as error:
        open_source(f"parquet:{path}")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no file matches"):
        open_source(f"parquet:{tmp_path}/b-*.parquet")
    with pytest.raises(UserError, match="did you mean `parquet:"):
        open_source(f"{path}")
    write(path, [{"jpg": data} for data in pictures])
    monkeypatch.setattr("vlm_jax.data.sources.parquet.MAX_GROUP", 100)
    with pytest.raises(UserError, match="write it anew with row groups of 100 rows"):
        open_source(f"parquet:{path}")
