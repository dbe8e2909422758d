"""Prepared TFDS data sets: the embedded one."""

import copy
import pickle

import numpy as np
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


def test_tfds_knows_the_names_of_labels(emoji):
    import tensorflow_datasets as tfds

    named = tfds.features.ClassLabel(names=["cat", "dog"])
    features = dict(
        label=named, several=tfds.features.Sequence(named), deep={"label": tfds.features.ClassLabel(num_classes=2)},
        nothing=tfds.features.ClassLabel(), number=tfds.features.Scalar(np.int32),
    )  # fmt: skip
    source = copy.copy(emoji)
    source.features = tfds.features.FeaturesDict(features)
    assert source.label_names("label") == source.label_names("several") == {0: "cat", 1: "dog"}
    assert source.label_names("deep/label") == {0: "0", 1: "1"}
    assert {source.label_names(path) for path in ("nothing", "number", "deep", "deep/none", "label/a")} == {None}
