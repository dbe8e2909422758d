"""Batches: order, resuming, sharding over processes, bad examples."""

import io
import json
import logging
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from vlm_jax.data import examples, loader
from vlm_jax.data import order as orders
from vlm_jax.data.rows import collate
from vlm_jax.errors import UserError

OPS = "decode | random_resized_crop(8, scale=(0.3, 1.0)) | flip | normalize"


def picture(i, size=(12, 10), format="PNG"):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
    pixels[0, 0, 0] = i
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """50 pictures, 25 in each of two classes; pixel (0, 0, 0) is the number of the picture."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(50):
        path = root / f"class{i // 25}" / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture(i))
    return f"folder:{root}"


def jsonl(tmp_path, rows):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) if isinstance(row, dict) else row for row in rows))
    return f"jsonl:{tmp_path}/rows.jsonl"


def train(uri, ops=OPS, batch_size=8, **options):
    return loader.train_loader(uri=uri, ops=ops, batch_size=batch_size, **options)


def take(batches, n):
    return [next(batches) for _ in range(n)]


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert set(x) == set(y)
        for name in x:
            np.testing.assert_array_equal(np.asarray(x[name]), np.asarray(y[name]))


def numbers(batches):
    return np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches]).tolist()


@pytest.fixture(scope="module")
def uninterrupted(folder):
    return take(train(folder, seed=7), 14)


def test_every_epoch_is_a_new_permutation_without_its_last_partial_batch(folder):
    batches = train(folder, "decode | keep('image')")
    assert batches.num_examples == 50 and batches.batches_per_epoch == 6
    assert batches.example["image"].shape == (1, 12, 10, 3)
    first, second = numbers(take(batches, 6)), numbers(take(batches, 6))
    for epoch in (first, second):
        assert len(set(epoch)) == 48
    assert first != second
    assert batches.read == 96 and batches.bad == 0


def test_batches_depend_on_the_seed_alone(folder, uninterrupted):
    assert_same(take(train(folder, seed=7, threads=3), 14), uninterrupted)
    other = next(train(folder, seed=8))
    assert not np.array_equal(other["image"], uninterrupted[0]["image"])


def test_augmentation_is_drawn_anew_in_every_epoch_also_behind_a_cache(folder):
    plain = take(train(folder, OPS), 14)
    cached = take(train(folder, OPS.replace("decode |", "decode | cache |")), 14)
    assert_same(plain, cached)
    images = np.concatenate([batch["image"] for batch in plain]).reshape(112, -1)
    assert len(np.unique(images, axis=0)) > 108  # pictures this small have few different crops


@pytest.mark.parametrize("threads", [1, 3])
def test_resuming_equals_never_stopping(folder, uninterrupted, threads):
    batches = train(folder, seed=7, threads=threads)
    take(batches, 5)
    state = json.loads(json.dumps(batches.get_state()))
    assert_same(take(batches, 2), uninterrupted[5:7])  # what was read ahead does not count
    batches.close()
    again = train(folder, seed=7)
    next(again)
    again.set_state(state)
    assert again.read == 40
    assert_same(take(again, 9), uninterrupted[5:])
    again.set_state(state)
    assert_same(take(again, 1), uninterrupted[5:6])


def test_worker_processes_give_the_same_batches_and_resume(folder, uninterrupted):
    batches = train(folder, seed=7, workers=2)
    batches.start()
    assert_same(take(batches, 9), uninterrupted[:9])
    state = batches.get_state()
    assert state == {
        "batch": 9, "read": 72, "bad": 0, "kinds": {}, "batch_size": 8, "num_examples": 50, "seed": 7,
        "fingerprints": batches.fingerprints,
    }  # fmt: skip
    assert batches.wait_seconds > 0
    batches.close()
    in_process = train(folder, seed=7)
    in_process.set_state(state)
    assert_same(take(in_process, 2), uninterrupted[9:11])
    batches.set_state({**state, "batch": 3, "read": 24})
    assert_same(take(batches, 3), uninterrupted[3:6])
    batches.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_keep_their_type_on_their_way_out_of_threads_and_processes(folder, workers):
    batches = train(folder, "decode | random_crop(99)", workers=workers)
    with pytest.raises(UserError, match=r"random_crop\(99, 99\) was given an image of 12x10"):
        next(batches)
    batches.close()


def test_a_state_of_other_data_is_refused(folder):
    batches = train(folder)
    for change, message in (({"batch_size": 4}, "batch_size=4"), ({"seed": 3}, "seed=3"), ({"num_examples": 9}, "=9")):
        with pytest.raises(UserError, match=message):
            batches.set_state({**batches.get_state(), **change})


def test_processes_share_the_batch_of_one_process(folder, uninterrupted):
    for rows in ([0, 1, 4, 5], [6], np.arange(8)):
        share = take(train(folder, seed=7, rows=rows), 8)
        assert_same(share, [{name: array[rows] for name, array in batch.items()} for batch in uninterrupted[:8]])
    with pytest.raises(UserError, match="batch_size=0; expected 1 or more"):
        train(folder, batch_size=0)


def test_where_keeps_the_records_with_these_values(folder):
    batches = train(folder, "decode", where={"label": (1,)})
    assert batches.num_examples == 25
    assert set(numbers(take(batches, 9))) == set(range(25, 50))
    (batch,) = loader.eval_batches(uri=folder, ops="decode | keep('text')", batch_size=25, where={"text": "class0"})
    assert batch["text"].tolist() == ["class0"] * 25
    with pytest.raises(UserError, match=r"has 0 examples after where=\{'label': \(9,\)\}, fewer than batch_size=8"):
        train(folder, where={"label": (9,)})


def test_fewer_examples_than_a_batch(folder):
    with pytest.raises(UserError, match="has 50 examples, fewer than batch_size=64"):
        train(folder, batch_size=64)


def test_examples_of_several_shapes_are_named(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(picture(i, (8 + i % 2, 8)))
    with pytest.raises(UserError, match=r"`image` has shapes \[\(8, 8, 3\), \(9, 8, 3\)\]"):
        next(train(f"folder:{tmp_path}", "decode", batch_size=4))


def bad_folder(root, bad):
    """Pictures of which number i has the bytes bad[i] instead, if there."""
    for i in range(40):
        (root / f"{i:02d}.jpg").write_bytes(bad.get(i, picture(i, format="JPEG")))
    return f"folder:{root}"


def test_a_truncated_jpeg_is_counted_logged_and_replaced(tmp_path, caplog):
    uri = bad_folder(tmp_path, {3: picture(3, format="JPEG")[:400]})
    for workers in (0, 2):
        caplog.clear()
        batches = train(uri, batch_size=10, workers=workers)
        with caplog.at_level(logging.WARNING):
            out = take(batches, 8)  # two epochs
        lines = [r.getMessage() for r in caplog.records if "bad example" in r.getMessage()]
        assert len(lines) == 2 and lines[0].startswith("bad example 03.jpg: image cannot be decoded:")
        assert (batches.bad, batches.read) == (2, 82)
        state = batches.get_state()
        batches.close()
        if workers == 0:
            expected = out
        assert_same(out, expected)
    resumed = train(uri, batch_size=10)
    resumed.set_state(state | {"batch": 4, "read": 41, "bad": 1})
    assert_same(take(resumed, 4), expected[4:])
    assert (resumed.bad, resumed.read) == (2, 82)
    cached = train(uri, OPS.replace("decode |", "decode | resize(12) | cache |"), batch_size=10)
    take(cached, 8)
    assert (cached.bad, cached.read) == (2, 82)


def test_an_empty_caption_a_missing_file_and_a_broken_line_are_bad_examples(tmp_path, caplog):
    (tmp_path / "a.png").write_bytes(picture(1))
    rows = [{"image": "a.png", "title": f"title {i}"} for i in range(30)]
    rows[4]["title"], rows[9]["image"] = " ", "gone.png"
    rows[20] = "{"
    batches = train(
        jsonl(tmp_path, rows), 'caption("title") | decode | keep("image", "text")', 10, max_bad_fraction=0.2
    )
    with caplog.at_level(logging.WARNING):
        texts = np.concatenate([batch["text"] for batch in take(batches, 3)])
    lines = "\n".join(record.getMessage() for record in caplog.records)
    assert "bad example rows.jsonl:5: caption `title` is empty" in lines
    assert "bad example rows.jsonl:10: " in lines and "gone.png: No such file or directory" in lines
    assert "bad example rows.jsonl:21: not JSON" in lines
    assert batches.read == 30 + batches.bad and batches.bad >= 3  # one may have been tried in another's place, too
    assert len(set(texts)) == 27 and "title 4" not in texts


def test_more_bad_examples_than_allowed_is_an_error(tmp_path):
    uri = bad_folder(tmp_path, dict.fromkeys((3, 8, 20), b"nothing"))
    with pytest.raises(
        UserError, match=r"^2 of \d+ examples read are bad, more than max_bad_fraction=0\.001; the last"
    ):
        take(train(uri, batch_size=10), 4)
    with pytest.raises(UserError, match=r"^1 of \d+ examples read are bad, more than max_bad_fraction=0; the last is"):
        take(train(uri, batch_size=10, max_bad_fraction=0.0), 4)
    assert len(take(train(uri, batch_size=10, max_bad_fraction=0.1), 40)) == 40


def test_a_data_set_with_no_good_example_ends(tmp_path):
    uri = bad_folder(tmp_path, dict.fromkeys(range(40), b"nothing"))
    with pytest.raises(UserError, match=r"^40 examples in a row are bad; the last is .*jpg: image cannot be decoded"):
        next(train(uri, batch_size=10, max_bad_fraction=1.0))
    with pytest.raises(UserError, match="40 examples in a row are bad"):
        list(loader.eval_batches(uri=uri, ops=OPS, batch_size=10, max_bad_fraction=1.0))


def test_eval_batches_cover_every_example_once_in_order(folder):
    batches = loader.eval_batches(uri=folder, ops="decode", batch_size=16)
    assert len(batches) == 4
    for _ in range(2):
        out = list(batches)
        assert [batch["mask"].sum() for batch in out] == [16, 16, 16, 2]
        assert {batch["image"].shape for batch in out} == {(16, 12, 10, 3)}
        masked = [{"image": batch["image"][batch["mask"]]} for batch in out]
        assert numbers(masked) == list(range(50))
    assert out[0]["label"].dtype == np.int32


def test_eval_shares_of_two_processes_are_disjoint_and_complete(folder):
    seen = []
    for rows in (range(0, 16, 2), range(1, 16, 2)):
        batches = loader.eval_batches(uri=folder, ops="decode", batch_size=16, rows=rows)
        out = list(batches)
        assert [len(batch["mask"]) for batch in out] == [8] * 4
        seen += numbers([{"image": batch["image"][batch["mask"]]} for batch in out])
    assert sorted(seen) == list(range(50))


def test_eval_masks_bad_examples(tmp_path, caplog):
    uri = bad_folder(tmp_path, {3: b"nothing"})
    with caplog.at_level(logging.WARNING):
        out = list(loader.eval_batches(uri=uri, ops=OPS, batch_size=16))
    assert np.flatnonzero(~np.concatenate([batch["mask"] for batch in out])).tolist() == [3, *range(40, 48)]
    assert "bad example 03.jpg" in caplog.text
    with pytest.raises(UserError, match="1 of 40 examples read are bad, more than max_bad_fraction=0"):
        list(loader.eval_batches(uri=uri, ops=OPS, batch_size=16, max_bad_fraction=0.0))


def test_wds_shards_through_worker_processes(tmp_path):
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for i in range(8):
                for extension, data in (("png", picture(8 * shard + i)), ("txt", f"text {i}".encode())):
                    entry = tarfile.TarInfo(f"{shard}{i:03d}.{extension}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    batches = train(f"wds:{tmp_path}/{{0..1}}.tar", 'decode | caption("txt") | keep("image", "text")', 16, workers=1)
    batch = next(batches)
    batches.close()
    assert sorted(numbers([batch])) == list(range(16))
    assert sorted(set(batch["text"])) == [f"text {i}" for i in range(8)]


def test_collate_types():
    rows = [{"a": np.ones(2, np.uint8), "b": i, "c": i / 2, "d": True, "e": "x", "f": [1], "g": {}} for i in range(3)]
    batch = collate(rows)
    assert {k: (v.dtype.name, v.shape) for k, v in batch.items()} == {
        "a": ("uint8", (3, 2)), "b": ("int32", (3,)), "c": ("float32", (3,)), "d": ("bool", (3,))
    }  # fmt: skip
    with_texts = collate(rows, texts=True)
    assert with_texts["e"].tolist() == ["x"] * 3 and with_texts["f"].tolist() == [[1]] * 3
    with pytest.raises(UserError, match="some examples lack the field `a`"):
        collate([rows[0], {"b": 1}])


def test_the_generator_of_a_draw_is_that_of_a_fresh_philox():
    for seed, draw in ((0, 0), (3, 2**40), (2**31, 1)):
        fresh = np.random.Generator(np.random.Philox(key=[seed, draw]))
        rng = examples.generator(seed, draw)
        np.testing.assert_array_equal(fresh.random(5), rng.random(5))
        np.testing.assert_array_equal(fresh.integers(9, size=3), rng.integers(9, size=3))


def test_a_very_large_epoch_needs_no_memory():
    order = orders.full(0, 3, 2**33)
    assert len({int(order[i]) for i in range(100)}) == 100


def test_tensorflow_is_not_imported_and_jax_not_by_this_package():
    """Worker processes import these modules; grain itself imports jax where it is installed, and nothing else may."""
    code = (
        "import sys; sys.modules['jax'] = None; import vlm_jax.data.loader as l;"
        "l.train_loader(uri='tfds:emoji', split='train', ops='decode', batch_size=4);"
        "assert not any(m.split('.')[0] in ('tensorflow', 'torch', 'flax', 'optax', 'fsspec') for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)


def captions_in_tar(path, *texts):
    with tarfile.open(path, "w") as tar:
        for i, text in enumerate(texts):
            entry = tarfile.TarInfo(f"{i}.txt")
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))


def replaced(path, before, after):
    path.write_text(path.read_text().replace(before, after))


CHANGED = {  # the URI -> a change that keeps the number of examples
    "jsonl:{}/a.jsonl": lambda root: replaced(root / "a.jsonl", '"n": 3', '"n": 4'),
    "csv:{}/a.csv": lambda root: replaced(root / "a.csv", "3", "4"),
    "wds:{}/a.tar": lambda root: captions_in_tar(root / "a.tar", "text 0", "text 2", "text 1"),
    "folder:{}/pictures": lambda root: (root / "pictures" / "2.png").rename(root / "pictures" / "4.png"),
}


@pytest.mark.parametrize("uri", CHANGED)
def test_data_that_changed_between_stop_and_resume_are_refused(tmp_path, uri):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"n": i}) for i in range(1, 4)))
    (tmp_path / "a.csv").write_text("n\n1\n2\n3\n")
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        (tmp_path / "pictures" / f"{i}.png").write_bytes(picture(i))
    captions_in_tar(tmp_path / "a.tar", "text 0", "text 1", "text 2")
    np.save(tmp_path / "index.npy", np.arange(3))
    index = str(tmp_path / "index.npy")
    opened = lambda: train(uri.format(tmp_path), "", batch_size=3, index=index)
    state = json.loads(json.dumps(opened().get_state()))
    for name in ("a.jsonl", "a.csv", "a.tar", "pictures/2.png"):
        os.utime(tmp_path / name)
    opened().set_state(state)  # a time is no content
    changed = rf"the data set `{uri.format('.*')}` has changed since the data position was saved; restore it"
    np.save(tmp_path / "index.npy", np.arange(3)[::-1])
    with pytest.raises(UserError, match=changed):
        opened().set_state(state)
    np.save(tmp_path / "index.npy", np.arange(3))
    CHANGED[uri](tmp_path)
    with pytest.raises(UserError, match=changed):
        opened().set_state(state)
    opened().set_state({key: value for key, value in state.items() if key not in ("fingerprints", "kinds")})  # of 0.1.0
