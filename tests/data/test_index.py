"""An index: chosen examples of a source, and their weights."""

import io
import json
import os
import zipfile

import numpy as np
import pytest

from vlm_jax.data import index, loader
from vlm_jax.errors import UserError


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"n": n, "even": n % 2 == 0, "weight": -1.0}) for n in range(20)))
    return f"jsonl:{path}"


def epoch(uri, path, ops="keep('n', 'weight')", **options):
    """(number, weight) of all examples of an epoch, sorted."""
    batches = loader.train_loader(uri=uri, index=str(path), ops=ops, batch_size=1, **options)
    out = [next(batches) for _ in range(batches.num_examples)]
    return sorted((int(batch["n"][0]), float(batch["weight"][0])) for batch in out)


def test_an_index_chooses_repeats_and_weights(uri, tmp_path):
    chosen, weight = [7, 2, 19, 2], np.array([0.5, 2.0, 1.25, 3.0], np.float32)
    np.savez(tmp_path / "a.npz", index=np.array(chosen, np.int32), weight=weight)
    expected = [(2, 2.0), (2, 3.0), (7, 0.5), (19, 1.25)]
    assert epoch(uri, tmp_path / "a.npz") == expected
    assert epoch(uri, tmp_path / "a.npz", "cache | keep('n', 'weight')") == expected
    assert epoch(uri, tmp_path / "a.npz", where={"even": [True]}) == expected[:2]
    batch = next(loader.train_loader(uri=uri, index=str(tmp_path / "a.npz"), ops="keep('n', 'weight')", batch_size=4))
    assert batch["weight"].dtype == np.float32
    order = np.random.default_rng((0, 0)).permutation(4)
    np.testing.assert_array_equal(batch["n"], np.array(chosen)[order])
    np.testing.assert_array_equal(batch["weight"], weight[order])


def test_without_weights_they_are_1(uri, tmp_path):
    np.save(tmp_path / "a.npy", np.array([3, 3, 1]))
    np.savez(tmp_path / "a.npz", index=np.array([3, 3, 1]))
    for name in ("a.npy", "a.npz"):
        assert epoch(uri, tmp_path / name) == [(1, 1.0), (3, 1.0), (3, 1.0)]
    mixed = {
        "a": dict(uri=uri, index=str(tmp_path / "a.npy"), ops="keep('n', 'weight')"),
        "b": dict(uri=uri, ops="keep('n', 'weight')"),
    }
    batches = loader.train_loader(sources=mixed, batch_size=2)
    assert batches.num_examples == 23
    assert [next(batches)["weight"].tolist() for _ in range(3)] == [[-1.0, 1.0]] * 3  # `b` first, its field `weight`


def test_a_limit_keeps_some_examples_drawn_once(uri, tmp_path):
    """A memory: the same examples in every epoch, of those that `where` or an index chooses; others by another seed."""
    load = lambda seed=0, **options: loader.train_loader(uri=uri, ops="keep('n')", batch_size=1, seed=seed, **options)
    seen = lambda batches, count: [int(next(batches)["n"][0]) for _ in range(count)]
    batches = load(limit=5)
    assert batches.num_examples == 5
    once, again = seen(batches, 5), seen(batches, 5)
    assert sorted(once) == sorted(again) and len(set(once)) == 5
    assert sorted(seen(load(seed=1, limit=5), 5)) != sorted(once)
    even = seen(load(limit=5, where={"even": [True]}), 5)
    assert len(set(even)) == 5 and not any(n % 2 for n in even)
    assert load(limit=50).num_examples == 20
    np.savez(tmp_path / "a.npz", index=np.array([7, 2, 19]), weight=np.array([0.5, 2.0, 3.0]))
    kept = epoch(uri, tmp_path / "a.npz", limit=2)
    assert len(kept) == 2 and set(kept) < {(7, 0.5), (2, 2.0), (19, 3.0)}
    with pytest.raises(UserError, match=r"config\.data\.limit is 0; expected 1 or more"):
        load(limit=0)
    with pytest.raises(UserError, match="has 3 examples after limit=3, fewer than batch_size=4"):
        loader.train_loader(uri=uri, ops="keep('n')", batch_size=4, limit=3)


def test_what_a_user_gets_wrong_is_named(uri, tmp_path):
    def message(name, **arrays):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(UserError) as error:
            index.read(str(tmp_path / f"{name}.npz"), 20, uri)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert f"names example 20; `{uri}` has 20 examples, from 0 to 19" in message("a", index=np.array([3, 20, 21]))
    assert "names example -1;" in message("a", index=np.array([-1]))
    assert "`index` is float64 [2]; expected integers [n]" in message("a", index=np.array([1.0, 2.0]))
    assert "`index` is int64 [1, 2]; expected" in message("a", index=np.array([[1, 2]]))
    some = np.array([1, 2])
    assert "`weight` is int64 [2]; expected finite floats [2]" in message("a", index=some, weight=some)
    assert "`weight` is float64 [1]; expected" in message("a", index=some, weight=np.ones(1))
    assert "`weight` is float64 [2]; expected" in message("a", index=some, weight=np.array([1.0, np.nan]))
    assert "has the arrays index, weights; expected `index`, and `weight`" in message("a", index=some, weights=some)
    assert "cannot be read; expected an .npz or .npy" in message("a", index=np.array([None]))
    (tmp_path / "b.npz").write_text("1, 2, 3")
    for name, said in (("gone.npz", "does not exist"), ("b.npz", "cannot be read")):
        with pytest.raises(UserError, match=rf"^index `{tmp_path}/{name}` {said}"):
            loader.train_loader(uri=uri, ops="", batch_size=1, index=str(tmp_path / name))
    np.save(tmp_path / "c.npy", some)
    with pytest.raises(UserError, match=r"has 2 examples after index=.*c.npy, fewer than batch_size=4"):
        loader.train_loader(uri=uri, ops="", batch_size=4, index=str(tmp_path / "c.npy"))


def bomb(path, shape, data=b""):
    """An .npz file whose `index` is to have this shape, and has these bytes."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<i8", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("index.npy", head.getvalue() + data)


def test_a_file_of_a_stranger_takes_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "MAX_BYTES", 2**16)
    bomb(tmp_path / "huge.npz", (10**12,))
    bomb(tmp_path / "zeros.npz", (2**18,), bytes(2**21))
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as file:
        file.writestr("index", "text")
    (tmp_path / "huge.npy").write_bytes(
        b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<i8', 'fortran_order': False, 'shape': (10**12,), }".ljust(117) + b"\n"
    )
    os.mkfifo(tmp_path / "fifo.npz")
    for path in tmp_path.iterdir():
        with pytest.raises(UserError, match=r"cannot be read; expected an .npz or .npy file of numbers"):
            index.read(str(path), 9, "u")
