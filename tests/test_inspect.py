"""`vlm-jax inspect`: what a data set holds, and what would be bad."""

import json

import pytest

from tests.support.pictures import write_pictures
from vlm_jax import inspect
from vlm_jax.errors import UserError


@pytest.fixture
def table(tmp_path):
    """Four rows: three with pictures, one of these no picture; counts have names of their own."""
    write_pictures(tmp_path, 3)
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()[:3]]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows[2]["image"] = "broken.png"
    rows = [
        row | dict(tags=["a", "b"] if i else [], counts={f"{i}-{j}": j for j in range(20)})
        for i, row in enumerate(rows)
    ]
    path = tmp_path / "table.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": "<no picture>"}]))
    return path


def test_fields_pictures_and_what_is_bad(table, tmp_path):
    found, shown = inspect.inspect(f"jsonl:{table}")
    assert (found["records"], found["read"], len(shown)) == (4, 4, 3)
    (bad,) = found["bad"].values()
    assert bad == {"records": 1, "first": "table.jsonl:3"}
    assert found["fields"]["image"] == {"records": 2, "kind": "uint8 [*, *, *]", "example": "3,072 bytes"}
    assert found["fields"]["tags"] == {"records": 2, "kind": "list of text", "example": "['a', 'b']"}
    assert found["fields"]["text"]["records"] == 3
    assert found["fields"]["counts/*"] == {"records": 2, "kind": "whole number", "example": "19"}
    assert found["pictures"] == {"width": [32, 32, 32], "height": [32, 32, 32]}
    assert "table.jsonl:3" in inspect.text(found)
    page = inspect.page("table", found, shown, tmp_path / "page.html").read_text()
    assert page.count("data:image/png") == 2 and "&lt;no picture&gt;" in page


def test_a_sample_is_spread_over_the_set():
    found, shown = inspect.inspect("tfds:emoji", "train", sample=12)
    assert found["read"] == 12 and len(shown) == 10
    assert len({example["style"] for example in shown}) > 2


def test_no_records(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(UserError, match="has no records"):
        inspect.inspect(f"jsonl:{tmp_path / 'a.jsonl'}")
