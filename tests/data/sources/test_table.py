"""Rows of tables with the paths of their pictures."""

import csv
import json

import numpy as np
import pytest

from tests.support.records import red, red_of
from vlm_jax.data.source import BadExample
from vlm_jax.data.sources import open_source, select, table


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


def test_rows_of_a_stranger(tmp_path):
    (tmp_path / "0.PNG").write_bytes(red(9))
    (tmp_path / "noending").write_bytes(red(8))
    (tmp_path / "0.avif").write_bytes(red(7))
    rows = [
        ('{"image": "0.PNG"}', 9),
        ('{"image": "noending"}', 8),
        ('{"image": "0.avif", "n": 1}', 7),
        ('{"image": 7, "path": "0.PNG"}', 9),
        ('{"image": null, "file_name": "0.PNG"}', 9),
        ('\ufeff{"image": "0.PNG"}', 9),
        ('{"image": "http://x.org/a.jpg"}', "is a URL, not a file"),
        ('{"image": "https://x.org/a?b=1"}', "is a URL, not a file"),
        ('{"image": "a\\u0000.png"}', "is no path"),
        ('{"image": "\\ud800.png"}', "half a surrogate pair"),
        ('{"image": "0.PNG", "c": "\\udc00"}', "half a surrogate pair"),
        ('{"a": ' + "[" * 10**5 + "}", "not JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not JSON"),
        ("caf\xe9", "not UTF-8: byte 0xe9 at 3"),
        ("null", "is a JSON NoneType"),
        ("\0\0", "not JSON"),
    ]
    lines = [line.encode("latin-1" if "caf" in line else "utf-8") for line, _ in rows]
    (tmp_path / "a.jsonl").write_bytes(b"\n\n".join(lines))
    source = open_source(f"jsonl:{tmp_path}/a.jsonl")
    assert len(source) == len(rows) and source.key(2) == "a.jsonl:5"
    for i, (_, expected) in enumerate(rows):
        if isinstance(expected, int):
            assert red_of(source[i]["image"]) == expected
        else:
            with pytest.raises(BadExample, match=expected) as error:
                source[i]
            assert error.value.kind in ("row", "file")
    assert source.narrow(frozenset({"c"}))[6] == {"image": "http://x.org/a.jpg"}
    nothing = '{"image": "gone", "caption": 3}'
    (tmp_path / "b.jsonl").write_text(nothing)
    assert open_source(f"jsonl:{tmp_path}/b.jsonl")[0] == json.loads(nothing)


def test_a_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "MAX_LINE", 64)
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n{"a": "' + "x" * 300 + '"}\n{"n": 2}\n' + " " * 100 + '{"n": 3}')
    source = open_source(f"jsonl:{tmp_path}/a.jsonl")
    assert len(source) == 4 and source[0] == {"n": 1} and source[2] == {"n": 2} and source.key(2) == "a.jsonl:3"
    for i in (1, 3):
        with pytest.raises(BadExample, match="bytes, more than 64"):
            source[i]
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n')
    with pytest.raises(BadExample, match="the file is shorter than it was"):
        source[2]
