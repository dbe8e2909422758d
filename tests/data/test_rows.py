"""Rows: fields that most rows share, rows that differ, numbers that do not fit."""

import json
import logging

import numpy as np
import pytest

from vlm_jax.data import loader, ops, rows
from vlm_jax.data.source import BadExample
from vlm_jax.errors import UserError

GOOD = {"n": 3, "x": 0.5, "flag": True, "text": "a", "ids": np.zeros(2, np.int64), "of": {"a": np.zeros(3)}}
FIELDS = rows.fields_of([GOOD] * 3, texts=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"n": None}, "`n` is absent, in other examples an integer of 32 bits"),
        ({"n": "3"}, "`n` is a str"),
        ({"n": [3]}, "`n` is a list"),
        ({"n": 1.5}, "`n` is 1.5"),
        ({"n": float("nan")}, "`n` is nan"),
        ({"n": 2**31}, "`n` is 2147483648, in other examples an integer of 32 bits"),
        ({"n": -(2**31) - 1}, "`n` is -2147483649"),
        ({"x": float("inf")}, "`x` is inf, in other examples a finite number"),
        ({"x": 1e300}, "`x` is 1e\\+300"),
        ({"flag": 2}, "`flag` is 2"),
        ({"text": 7}, "`text` is 7, in other examples a text or a list"),
        ({"ids": np.zeros(3, np.int64)}, r"`ids` is int64\[3\] up to 0, in other examples int64\[2\]"),
        ({"ids": np.zeros(2)}, r"`ids` is float64\[2\], in"),
        ({"ids": np.array([0, 2**40])}, "`ids` is .* up to 1099511627776"),
        ({"of": {"a": np.zeros(4)}}, "`a` is float64"),
        ({"of": None}, "`of` is absent, in other examples a dict of arrays"),
    ],
)
def test_a_row_that_differs_from_the_others_is_a_bad_example(change, reason):
    with pytest.raises(BadExample, match=reason):
        rows.check(GOOD | change, FIELDS)


def test_a_row_of_other_spelling_is_not():
    for change in (
        {"n": 2.0},
        {"n": -(2**31)},
        {"n": np.int64(7)},
        {"x": 3},
        {"flag": 1},
        {"text": ["a", "b"]},
        {"b": 1},
    ):
        rows.check(GOOD | change, FIELDS)
    batch = rows.stack([GOOD, GOOD | {"n": 2.0, "x": 3}], FIELDS)
    assert batch["n"].tolist() == [3, 2] and batch["n"].dtype == np.int32
    assert batch["x"].tolist() == [0.5, 3.0] and batch["of"]["a"].shape == (2, 3)


def test_most_rows_decide():
    assert rows.fields_of([{"n": 1}, {"n": 2, "m": 3}, {"n": None}]) == {"n": np.int32}
    assert rows.fields_of([{"n": 1}, {"n": 0.5}]) == {"n": np.float32}
    with pytest.raises(UserError, match="`n` is an integer of 32 bits and a bool; the ops must give one type"):
        rows.collate([{"n": 1}, {"n": True}])


ODD = {
    "null": {"n": None, "text": "x"},
    "beyond 32 bits": {"n": 2**40, "text": "x"},
    "null caption": {"n": 1, "text": None},
    "a number": {"n": 1, "text": 7},
    "lists of lists": {"n": 1, "text": [["x"]]},
    "nothing": {},
}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", ODD)
def test_one_odd_row_is_counted_and_replaced(tmp_path, name, first):
    table = [{"n": i, "text": f"text {i}"} for i in range(20)]
    table[0 if first else 13] = ODD[name]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, table)))
    batches = loader.train_loader(
        uri=f"jsonl:{tmp_path}/a.jsonl", ops="caption('text') | keep('n', 'text')", batch_size=4
    )
    numbers = np.concatenate([next(batches)["n"] for _ in range(5)])
    assert numbers.dtype == np.int32 and batches.bad == sum(batches.kinds.values()) == 1
    assert set(batches.kinds) <= {"field", "text"} and batches.get_state()["kinds"] == dict(batches.kinds)
    (batch,) = loader.eval_batches(uri=f"jsonl:{tmp_path}/a.jsonl", ops="caption('text') | keep('n')", batch_size=20)
    assert np.flatnonzero(~batch["mask"]).tolist() == [0 if first else 13]


class PanicException(BaseException):
    pass


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (TypeError("of a sort"), "TypeError"),
        (MemoryError(), "MemoryError"),
        (PanicException("in Rust"), "PanicException"),
        (UserError("too small; resize"), "ops"),
        (OSError(5, "Input/output error"), "OSError"),
    ],
)
def test_an_exception_of_one_record_is_a_bad_example(tmp_path, caplog, error, kind):
    @ops.op
    def odd(example: dict) -> dict:
        if example["n"] == 13:
            raise error
        return example

    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"n": i}) for i in range(20)))
    try:
        batches = loader.train_loader(uri=f"jsonl:{tmp_path}/a.jsonl", ops="odd | keep('n')", batch_size=20)
        with caplog.at_level(logging.WARNING):
            next(batches)
    finally:
        del ops.OPS["odd"]
    assert batches.kinds == {kind: 1}
    assert caplog.messages[-1].startswith(f"bad example a.jsonl:14: {'too small' if kind == 'ops' else kind}")


def test_an_interrupt_is_none(tmp_path):
    @ops.op
    def stop(example: dict) -> dict:
        raise KeyboardInterrupt

    (tmp_path / "a.jsonl").write_text('{"n": 1}\n')
    try:
        with pytest.raises(KeyboardInterrupt):
            loader.eval_batches(uri=f"jsonl:{tmp_path}/a.jsonl", ops="stop", batch_size=1)[0]
    finally:
        del ops.OPS["stop"]


def test_what_where_cannot_read_is_counted(tmp_path, caplog):
    table = [{"n": 1, "c": "a"}, {"n": 2, "c": ["a"]}, {"n": 3}, {"n": 4, "c": "a"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, table)) + "\n{")
    with caplog.at_level(logging.WARNING):
        batches = loader.train_loader(
            uri=f"jsonl:{tmp_path}/a.jsonl", ops="keep('n')", batch_size=2, where={"c": ("a",)}
        )
    assert sorted(next(batches)["n"].tolist()) == [1, 4]
    assert batches.left_out == {"without a usable c": 2} and "left out 2 without a usable c" in caplog.text
