"""A pass over ten pictures: what counts, what is appended, and where it continues."""

import json

import numpy as np
import pytest
from PIL import Image

from vlm_jax.errors import UserError
from vlm_jax.evaluators.one_pass import Pass, picture_ops
from vlm_jax.evaluators.progress import Progress
from vlm_jax.evaluators.result import Result

OPS = picture_ops("resize(2) | to_float", "name", "number")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Ten grey pictures; odd ones are named; the seventh is broken."""
    folder = tmp_path_factory.mktemp("ten")
    rows = []
    for i in range(10):
        Image.new("RGB", (4, 4), (20 * i,) * 3).save(folder / f"{i}.png")
        rows.append(json.dumps({"image": f"{i}.png", "name": "odd" if i % 2 else "", "number": i}))
    (folder / "7.png").write_bytes(b"no picture")
    (folder / "ten.jsonl").write_text("\n".join(rows))
    return dict(uri=f"jsonl:{folder}/ten.jsonl", ops=OPS)


def odd(fields):
    name, number = fields
    return number if name else None


def brightness(batch):
    return {"found": {"grey": batch.inputs.mean((1, 2, 3))[batch.kept], "position": batch.position}}


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_rows_that_count(data, batch_size):
    one, sizes = Pass(None, batch_size=batch_size, **data), []
    one.begin("found")

    def rows(batch):
        assert batch.inputs.shape == (batch_size, 2, 2, 3) == (batch.size, 2, 2, 3)
        assert batch.about == batch.position.tolist(), "the numbers are the places"
        spread = batch.spread(batch.about, None)
        assert [spread[row] for row in batch.kept] == batch.about and spread.count(None) == batch_size - len(batch.kept)
        sizes.append(len(batch.kept))
        return brightness(batch)

    assert one.run(rows, about=odd) == 4 == sum(sizes) and min(sizes) > 0
    assert one.counts == {"batches": -(-10 // batch_size), "examples": 4, "left_out": 5, "bad picture": 1}
    assert one.tables["found"].read("position").tolist() == [1, 3, 5, 9]
    np.testing.assert_allclose(one.tables["found"].read("grey"), np.array([1, 3, 5, 9]) * 20 / 255, atol=1e-6)
    found = one.result(lambda tables: Result({"rows": len(tables["found"])}, {}), "left_out")
    assert found.metrics == {"rows": 4, "left_out": 5.0, "bad_examples": 1.0}


def test_only_some_places_and_what_is_read_of_them(data):
    one = Pass(None, batch_size=4, where={"name": ["odd"]}, **data)
    assert one.fields("number", "name") == [[i, "odd"] for i in (1, 3, 5, 7, 9)]
    one.only(np.array([0, 4]))
    one.begin("found")
    assert one.num_examples == 2
    assert one.run(brightness, about=lambda place: int(place), columns=["position"]) == 2
    assert [row["number"] for row in one.look_up('keep("number")', [1, 0])] == [9, 1]
    assert one.thumbnails([1]).shape == (1, 96, 96, 3)


def test_passes_share_a_progress(data, tmp_path):
    """The second of two passes is stopped after its first batch; again, only the rest is read."""

    def passes():
        progress = Progress(tmp_path)
        pair = [Pass(None, progress, batch_size=4, name=name, **data) for name in ("", "train_")]
        for one, table in zip(pair, ("found", "known"), strict=True):
            one.begin(table, kind="test")
        return progress, *pair

    def known(batch):
        calls.append(batch.position.tolist())
        if len(calls) == 2:
            raise KeyboardInterrupt
        return {"known": brightness(batch)["found"]}

    calls = []
    progress, one, other = passes()
    one.run(brightness, about=odd)
    with pytest.raises(KeyboardInterrupt):
        other.run(known, about=odd)
    progress.save(now=True)
    record = json.loads((tmp_path / "progress.json").read_text())
    assert record["counts"]["batches"] == 3 and record["counts"]["train_batches"] == 1
    assert record["facts"] == {"examples": 10, "train_examples": 10, "batch_size": 4, "kind": "test"}

    _, one, other = passes()
    assert one.run(brightness, about=odd) == 4 and other.run(known, about=odd) == 4
    assert calls == [[1, 3], [5], [5], [9]]
    assert other.counts == {"batches": 3, "examples": 4, "left_out": 5, "bad picture": 1}
    np.testing.assert_array_equal(other.tables["known"].read("position"), one.tables["found"].read("position"))
    with pytest.raises(UserError, match="progress of an evaluation with batch_size = 4, now it is 5"):
        Pass(None, Progress(tmp_path), batch_size=5, **data).begin("found")
