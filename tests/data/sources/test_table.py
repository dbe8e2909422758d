"""Rows of tables with the paths of their pictures."""

import csv
import json

import numpy as np
import pytest

from tests.support.records import red, red_of
from vlm_jax.data.source import BadExample
from vlm_jax.data.sources import open_source, select


def test_jsonl(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(red(9))
    rows = [{"image": "images/0.png", "title": "äpfel", "n": 1}, {"image": "images/none.png"}, {"title": "no image"}]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n{broken\n[1]"
    (tmp_path / "data.jsonl").write_text(text, encoding="utf-8")
    source = open_source(f"jsonl:{tmp_path}/data.jsonl")
    assert len(source) == 5
    record = source[0]
    assert red_of(record["image"]) == 9 and record["title"] == "äpfel" and record["n"] == 1
    assert source[2] == {"title": "no image"}
    for i, reason in ((1, r"none\.png: No such file"), (3, "not JSON"), (4, "is a JSON list")):
        with pytest.raises(BadExample, match=reason):
            source[i]
    assert source.key(1) == "data.jsonl:2"
    np.testing.assert_array_equal(select(source, {"title": ("äpfel", "no image")}), [0, 2])
    assert source.narrow(frozenset({"title"}))[1] == {"image": "images/none.png"}


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_csv(tmp_path, delimiter):
    (tmp_path / "0.png").write_bytes(red(5))
    with open(tmp_path / "data.csv", "w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([["filepath", "title"], ["0.png", "one, two\nthree"], ["gone.png", "x"]])
    source = open_source(f"csv:{tmp_path}/data.csv")
    assert len(source) == 2
    assert red_of(source[0]["image"]) == 5 and source[0]["title"] == "one, two\nthree"
    assert source.key(0) == "data.csv:2"
    with pytest.raises(BadExample, match=r"gone\.png"):
        source[1]
