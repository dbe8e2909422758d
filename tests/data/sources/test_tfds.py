"""Prepared TFDS data sets: the embedded one."""

import copy
import json
import os
import pickle
import sys

import numpy as np
import pytest

from vlm_jax.data import emoji as emoji_package
from vlm_jax.data import loader
from vlm_jax.data.sources import open_source
from vlm_jax.errors import UserError


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


FEATURES = json.loads((emoji_package.PREPARED / "features.json").read_text())
EVIL = "evil_module.Feature"


def legacy(name):
    inner = {"feature": {"type": name, "content": {}}, "length": 1}
    sequence = "tensorflow_datasets.core.features.sequence_feature.Sequence"
    return {"pythonClassName": sequence, "jsonFeature": {"json": json.dumps(inner)}}


@pytest.mark.parametrize(
    "change",
    [
        {"pythonClassName": EVIL},
        {"python_class_name": EVIL, "pythonClassName": None},
        {"featuresDict": {"features": {"a": {"pythonClassName": EVIL, "text": {}}}}},
        {"featuresDict": {"features": {"a": legacy(EVIL)}}},
        {"type": EVIL, "content": {}},
        {"pythonClassName": "os.path"},
    ],
)
def test_a_data_set_imports_nothing(tmp_path, monkeypatch, change):
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for path in emoji_package.PREPARED.iterdir():
        os.symlink(path, tmp_path / path.name)
    (tmp_path / "features.json").unlink()
    features = {key: value for key, value in (FEATURES | change).items() if value is not None}
    (tmp_path / "features.json").write_text(json.dumps(features))
    with pytest.raises(UserError, match=f"names `({EVIL}|os.path)`; expected a feature class of TFDS"):
        open_source(f"tfds:{tmp_path}", "train")
    assert "evil_module" not in sys.modules
    (tmp_path / "features.json").write_text(json.dumps(FEATURES))
    assert len(open_source(f"tfds:{tmp_path}", "unseen_style")) > 0


@pytest.mark.parametrize("name", ["huggingface:x", "kubric:movi_a", "kaggle:x/y:1.0.0"])
def test_a_name_downloads_no_code(name):
    with pytest.raises(UserError, match="would download and run code"):
        open_source(f"tfds:{name}", "train")


def test_damaged_files_are_one_line(tmp_path):
    shard = "emoji-unseen_style.array_record-00000-of-00001"
    for path in emoji_package.PREPARED.iterdir():
        os.symlink(path, tmp_path / path.name)
    fine = open_source(f"tfds:{tmp_path}", "unseen_style").fingerprint()
    changes = {"dataset_info.json": (b"", b"{", b"[]", b'{"name": 3}'), "features.json": (b"[" * 10**5, b"{}")}
    for name, contents in changes.items():
        for content in contents:
            (tmp_path / name).unlink()
            (tmp_path / name).write_bytes(content)
            with pytest.raises(UserError, match=r"cannot be (opened|read)") as error:
                open_source(f"tfds:{tmp_path}", "unseen_style")
            assert "\n" not in str(error.value)
        (tmp_path / name).unlink()
        os.symlink(emoji_package.PREPARED / name, tmp_path / name)
    (tmp_path / shard).unlink()
    (tmp_path / shard).write_bytes(b"x" * 2**17)
    with pytest.raises(UserError, match="examples in a row are bad"):
        next(loader.train_loader(uri=f"tfds:{tmp_path}", split="unseen_style", ops="keep('concept')", batch_size=2))
    assert open_source(f"tfds:{tmp_path}", "unseen_style").fingerprint() != fine
    (tmp_path / shard).unlink()
    os.mkfifo(tmp_path / shard)
    with pytest.raises(UserError, match="is a FIFO; expected a file"):
        open_source(f"tfds:{tmp_path}", "unseen_style")
    (tmp_path / shard).unlink()
    os.symlink(emoji_package.PREPARED / shard, tmp_path / shard)
    assert fine == open_source("tfds:emoji", "unseen_style").fingerprint()
    assert fine != open_source("tfds:emoji", "near_style").fingerprint()
