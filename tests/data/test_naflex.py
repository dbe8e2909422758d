"""NaFlex: which length a batch has, its rows on any number of processes and after a resume, and what is wrong."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest

from tests.support.pictures import write_pictures
from vlm_jax.data import loader
from vlm_jax.data.naflex import Buckets, read
from vlm_jax.errors import UserError

LENGTHS = dict(lengths=(12, 6), budget=50)
OPS = "decode | resize_to_patches(4) | normalize | pack_patches(4) | keep('image')"
TEXTS = OPS.replace("'image'", "'image', 'text'")


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """41 pictures, in turns wide, square and high; their numbers are in their captions."""
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder, 41, sizes=((16, 32), (24, 24), (32, 8)))
    return f"jsonl:{folder}/data.jsonl"


def batches_of(uri, ops=TEXTS, naflex=LENGTHS, **options):
    return loader.train_loader(uri=uri, ops=ops, batch_size=1, seed=3, naflex=naflex, **options)


def take(batches, count):
    found = []
    for _ in range(count):
        batch = next(batches)
        found.append((batches.length, batch["image"]["patches"], batch["image"]["grid"], batch["text"].tolist()))
    return found


def same(ours, others):
    for one, other in zip(ours, others, strict=True):
        assert one[0] == other[0] and one[3] == other[3]
        for array, expected in zip(one[1:3], other[1:3], strict=True):
            np.testing.assert_array_equal(array, expected)


@pytest.fixture(scope="module")
def whole(uri):
    return take(batches_of(uri), 14)


def test_every_length_comes_once_a_round_and_proportions_stay(whole):
    assert Buckets(**LENGTHS).sizes == {6: 8, 12: 4}
    lengths = [length for length, *_ in whole]
    assert all(set(lengths[i : i + 2]) == {6, 12} for i in range(0, 14, 2))
    assert len(set(itertools.pairwise(lengths))) > 2, "in orders that differ"
    shapes = {6: {"0": [2, 3], "1": [2, 2], "2": [4, 1]}, 12: {"0": [2, 4], "1": [3, 3], "2": [6, 2]}}
    for length, patches, grid, text in whole:
        assert patches.shape == ({6: 8, 12: 4}[length], length, 48)
        for own, shape, name in zip(patches, grid.tolist(), text, strict=True):
            assert shape == shapes[length][str(int(name.split()[1]) % 3)]
            assert own[: np.prod(shape)].any(1).all() and not own[np.prod(shape) :].any()
    epochs = [text for *_, own in whole for text in own]
    assert max(Counter(epochs[:36]).values()) == 1, "3 rounds of 12, and 5 pictures of 41 are left"
    assert set(epochs[36:72]) != set(epochs[:36]) and len(set(epochs[36:72])) == 36


def test_the_batches_are_a_function_of_seed_and_number(uri, whole):
    """In worker threads, after a resume at any batch, and for two processes that share the rows."""
    same(take(batches_of(uri, threads=3), 14), whole)
    batches = batches_of(uri)
    for k in range(5):
        state = json.loads(json.dumps(batches.get_state()))
        assert batches.count(k) == batches.read == sum(len(text) for *_, text in whole[:k])
        again = batches_of(uri)
        again.set_state(state)
        same(take(again, 2), whole[k : k + 2])
        next(batches)
    shares = [{6: [0, 1, 4, 5], 12: [0, 2]}, {6: [2, 3, 6, 7], 12: [1, 3]}]
    for rows in shares:
        found = take(batches_of(uri, rows=rows), 6)
        same(found, [(n, p[rows[n]], g[rows[n]], [t[i] for i in rows[n]]) for n, p, g, t in whole[:6]])


def test_a_mixture_goes_on_over_the_lengths(uri):
    few = uri + "?"  # the same table under another name
    sources = dict(a=dict(uri=uri, ops=OPS, weight=3.0), b=dict(uri=few[:-1], ops=OPS, weight=[(0, 1.0), (4, 3.0)]))
    batches = loader.train_loader(sources=sources, batch_size=1, naflex=LENGTHS)
    for _ in range(4):
        next(batches)
    taken = batches.taken()
    assert taken["data/a/examples"] + taken["data/b/examples"] == batches.count(4) == 24
    assert taken["data/length"] in (6, 12) and taken["data/a/examples"] > taken["data/b/examples"]


def test_what_is_remembered_is_shared_by_the_lengths(uri):
    cached = OPS.replace("decode |", "decode | cache |")
    plain, own = batches_of(uri, OPS), batches_of(uri, cached)
    for _ in range(4):
        np.testing.assert_array_equal(next(plain)["image"]["patches"], next(own)["image"]["patches"])
    first, second = (rows["batch"].sources[0] for rows in own._batches.sets.values())
    assert first.memory is second.memory and len(first.memory) >= 24


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(budget=11), "budget is 11, too small for a batch of length 12; expected 12 or more"),
        (dict(multiple=8), "budget is 50, too small for a batch of length 12; expected 96 or more"),
        (dict(lengths=()), r"lengths is \(\); expected different numbers, such as \(128, 256\)"),
        (dict(lengths=(6, 6)), "expected different numbers"),
        (dict(lengths="128"), "lengths is '128'; expected different numbers"),
        (dict(lengths=(True, 6)), "expected different numbers"),
        (dict(lengths=(6, 2**30)), "expected different numbers"),
        (dict(budget=0), "config.data.naflex.budget is 0; expected 1 or more"),
        (dict(budget="50"), "config.data.naflex: budget='50' should be a whole number"),
        (dict(bugdet=50), "no key `bugdet`; did you mean `budget`"),
        (dict(budget=600), r"data set `.*` has 41 examples, fewer than batch_size=100"),
    ],
)
def test_lengths_that_cannot_be_are_named(uri, change, message):
    with pytest.raises(UserError, match=message) as error:
        batches_of(uri, naflex=LENGTHS | change)
    assert "\n" not in str(error.value)


def test_ops_and_row_sets_that_do_not_fit_are_named(uri):
    fixed = OPS.replace("patches(4)", "patches(4, 12)")
    with pytest.raises(UserError, match="the ops make pictures of 12 patches for the length 6; write `resize_to_patc"):
        batches_of(uri, fixed)
    with pytest.raises(UserError, match="the ops make pictures of no patches for the length 6"):
        batches_of(uri, "decode | resize(8) | keep('image')")
    with pytest.raises(UserError, match="op `resize_to_patches`: missing a required argument: 'max_patches'"):
        loader.train_loader(uri=uri, ops=OPS, batch_size=4)
    sources = dict(a=dict(uri=uri, ops=OPS), b=dict(uri=uri, ops="keep('text')", rows="texts"))
    with pytest.raises(UserError, match=r"data.naflex is for one row set, `batch`"):
        loader.train_loader(sources=sources, batch_size=4, naflex=LENGTHS)


def test_devices_and_micro_batches_share_every_batch():
    buckets = read(LENGTHS)
    buckets.check(shards=2, accumulate=4)
    with pytest.raises(UserError, match=r"a batch of length 12 has 4 rows, which 8 devices .* set multiple=8"):
        buckets.check(shards=8, accumulate=1)
    with pytest.raises(
        UserError, match=r"a batch of length 6 has 8 rows, which 1 devices .* accumulate=3 cannot share"
    ):
        buckets.check(shards=1, accumulate=3)
    assert read(None) is None and read(LENGTHS | dict(multiple=4, budget=71)).sizes == {6: 8, 12: 4}
