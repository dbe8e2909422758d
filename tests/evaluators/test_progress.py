"""Rows in memory, in temporary files and in a folder, cut off where they were last saved."""

import numpy as np
import pytest

from vlm_jax.errors import UserError
from vlm_jax.evaluators import progress
from vlm_jax.evaluators.progress import Progress


def chunk(start, stop):
    at = np.arange(start, stop)
    return {"embedding": (at[:, None] + np.arange(3) / 10).astype(np.float32), "position": at}


@pytest.mark.parametrize("limit", [0, 100, 10_000])
def test_rows_beyond_the_memory_limit_live_in_a_file(limit):
    table = Progress().table("images", limit)
    for start in range(0, 50, 5):
        table.append(**chunk(start, start + 5))
    assert len(table) == 50
    assert table.in_memory == (limit >= 50 * (3 * 4 + 8))
    np.testing.assert_array_equal(table.read("position"), np.arange(50))
    np.testing.assert_array_equal(table.read("embedding", slice(13, 17)), chunk(13, 17)["embedding"])
    assert table.read("embedding", slice(48, 60)).shape == (2, 3)


def test_the_limit_is_a_share_of_the_free_memory(monkeypatch):
    assert 2**20 < progress.available_memory() < 2**50
    monkeypatch.setattr(progress, "available_memory", lambda: 1000)
    assert progress.memory_limit(0.25) == 250
    with pytest.raises(UserError, match="memory_share is 25; expected a share between 0 and 1"):
        progress.memory_limit(25)


def test_continues_from_what_was_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "SAVE_SECONDS", 0)
    first = Progress(tmp_path / "progress")
    assert first.begin(examples=20) == {}
    table = first.table("images", limit=1e6)
    table.append(**chunk(0, 8))
    first.save(batches=1)
    monkeypatch.setattr(progress, "SAVE_SECONDS", 1e9)
    table.append(**chunk(8, 16))  # the kill comes before these are saved
    first.save(batches=2)
    table.layout()

    again = Progress(tmp_path / "progress")
    assert again.begin(examples=20) == {"batches": 1}
    table = again.table("images", limit=1e6)
    assert not table.in_memory and len(table) == 8
    table.append(**chunk(8, 20))
    np.testing.assert_array_equal(table.read("embedding"), chunk(0, 20)["embedding"])
    again.delete()
    assert not (tmp_path / "progress").exists()


def test_other_data_is_not_continued(tmp_path):
    first = Progress(tmp_path)
    first.begin(examples=20)
    first.save(now=True)
    with pytest.raises(UserError, match="progress of an evaluation with examples = 20, now it is 21; choose another"):
        Progress(tmp_path).begin(examples=21)


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: "{",
        lambda record: record.replace('"rows": 3', '"rows": 1000000000000'),
        lambda record: record.replace("<f4", "|O"),
        lambda record: record.replace('"counts"', '"count"'),
    ],
)
def test_damaged_progress_starts_anew(damage, tmp_path, caplog):
    progress = Progress(tmp_path / "p")
    progress.begin(examples=3)
    progress.table("rows", 1e6).append(x=np.ones((3, 2), np.float32))
    progress.save(now=True, batches=1)
    record = tmp_path / "p" / "progress.json"
    assert Progress(tmp_path / "p").begin(examples=3) == {"batches": 1}
    record.write_text(damage(record.read_text()))
    assert Progress(tmp_path / "p").begin(examples=3) == {} and caplog.messages
