"""Prepared TFDS data sets: the embedded one."""

import pickle

import pytest

from vlm_jax.data.sources import open_source


@pytest.fixture(scope="module")
def emoji():
    return open_source("tfds:emoji", "train")


def test_tfds_reads_the_embedded_data_set(emoji):
    record = emoji[3]
    assert isinstance(record["image"], bytes) and isinstance(record["concept"], int)
    assert isinstance(record["style"], str) and isinstance(record["name"]["en"], str)
    assert isinstance(record["keywords"]["en"], list) and isinstance(record["keywords"]["en"][0], str)
    assert emoji.key(3) == "tfds:emoji/train[3]"
    narrow = pickle.loads(pickle.dumps(emoji.narrow(frozenset({"image", "name/en", "concept", "nothing"}))))
    assert narrow[3] == {k: record[k] for k in ("image", "concept")} | {"name": {"en": record["name"]["en"]}}


def test_tfds_split_slices(emoji):
    tail = open_source("tfds:emoji", "train[10:20]")
    assert len(tail) == 10 and tail[0]["image"] == emoji[10]["image"]
