"""Mixtures: turns, shares, row sets, resuming, processes, an index of examples."""

import json
import logging

import numpy as np
import pytest

from vlm_jax.data import loader, mixture, turns
from vlm_jax.errors import UserError

OPS = "random_caption('words') | keep('n', 'text')"


def write(folder, name, numbers, **change):
    """A table of these numbers, each with 20 words; `change` maps a number, `n7`, to a line in its place."""
    rows = [json.dumps({"n": n, "words": [f"{n} {word}" for word in range(20)]}) for n in numbers]
    lines = [change.get(f"n{n}", row) for n, row in zip(numbers, rows, strict=True)]
    (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return f"jsonl:{folder}/{name}.jsonl"


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    return {name: write(folder, name, numbers) for name, numbers in (("few", range(10)), ("many", range(100, 137)))}


def sources(tables, weights=(1.0, 3.0), **change):
    """`few` and `many` by these weights, sections of a config; `change` maps a name to further keys."""
    sections = {
        name: dict(uri=uri, ops=OPS, weight=weight) for (name, uri), weight in zip(tables.items(), weights, strict=True)
    }
    return {name: section | change.get(name, {}) for name, section in sections.items()}


def take(batches, n):
    return [next(batches) for _ in range(n)]


def plain(batches):
    """Batches as lists, to compare."""
    value = lambda x: {key: value(v) for key, v in x.items()} if isinstance(x, dict) else x.tolist()
    return [value(batch) for batch in batches]


@pytest.mark.parametrize("weights", [(1,), (1, 3), (5, 2, 2, 7), (1, 1000)])
def test_one_source_has_each_turn_and_shares_hold_over_any_stretch(weights):
    counts = np.array([turns.turns(position, weights) for position in range(2001)])
    steps = np.diff(counts, axis=0)
    assert set(steps.ravel()) <= {0, 1} and (steps.sum(1) == 1).all()
    off = counts - np.arange(2001)[:, None] * np.array(weights) / sum(weights)
    assert np.ptp(off, axis=0).max() < len(weights)
    assert turns.turns(10**15 * sum(weights), weights) == [10**15 * weight for weight in weights]


SCHEDULES = {
    "fixed": (3.0, 1.0, 0.5),
    "a ramp": ([(0, 3.0), (1000, 1.0)], 1.0, 0.5),
    "a jump": ([(0, 2.0), (400, 2.0), (400, 0.1)], 1.0, 1.0),
    "a source that never begins": (1.0, 2.0, [(0, 1.0), (0, 0)]),
    "a late source": (1.0, [(500, 0), (700, 1.0)], [(0, 0.3), (900, 0)]),
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_weights_are_kept_to_a_percent_over_1e5_draws(kind):
    size, batches = 100, 1000
    points = [turns.points_of(weight, "weight") for weight in SCHEDULES[kind]]
    own = turns.Turns(points, size)
    counts = np.array([own(k * size) for k in range(batches + 1)])
    values = np.array([[turns.value_at(one, k) for one in points] for k in range(batches)])
    wanted = size * (values / values.sum(1, keepdims=True)).cumsum(0)
    assert (counts.sum(1) == size * np.arange(batches + 1)).all()
    np.testing.assert_allclose(counts[-1], wanted[-1], rtol=0.01)
    assert np.abs(counts[1:] - wanted).max() <= 0.01 * wanted[-1].max()
    last = own(size * batches)
    for position in [*range(0, 300), *range(39_800, 40_200), *range(69_900, 70_100)]:
        steps = np.subtract(own(position + 1), own(position))
        assert sorted(steps) == [0, 0, 1]
        assert (np.array(own(position)) <= last).all()


def test_a_schedule_changes_the_batches_and_the_log_counts_them(tables):
    weights = ([(0, 1.0), (5, 1.0), (5, 3.0)], 1.0)
    mixed = dict(sources=sources(tables, weights), batch_size=8, seed=3)
    batches = loader.train_loader(**mixed)
    assert batches.taken()["data/few/examples"] == 0
    out = take(batches, 10)
    assert [(batch["n"] < 10).sum() for batch in out] == [4] * 5 + [6] * 5
    assert batches.taken() == {
        "data/few/examples": 50, "data/few/epochs": 5.0, "data/many/examples": 30, "data/many/epochs": 30 / 37,
    }  # fmt: skip
    again = loader.train_loader(**mixed)
    again.set_state(json.loads(json.dumps(batches.get_state())) | {"batch": 3})
    assert plain(take(again, 7)) == plain(out[3:])
    assert loader.train_loader(uri=tables["few"], ops=OPS, batch_size=8).taken() == {}


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ("much", "few.weight is 'much'; expected a number above 0, or"),
        ([], r"few.weight is \[\]; expected"),
        ([(5, 1.0), (2, 1.0)], "in the steps' order"),
        ([(0.5, 1.0)], "few.weight is"),
        ([(0, -1.0)], "few.weight is"),
        ([(0, float("nan"))], "few.weight is"),
        ([(0, 0)], "few.weight is"),
        ([(0, 1.0), (9, 1.0, 2)], "few.weight is"),
        (True, "few.weight is True"),
    ],
)
def test_a_wrong_schedule_is_one_line(tables, weight, message):
    with pytest.raises(UserError, match=message):
        loader.train_loader(sources=sources(tables, (weight, 1.0)), batch_size=8)


def test_weights_of_0_together_are_one_line(tables):
    with pytest.raises(UserError, match="all weights of the sources are 0 after 7 steps"):
        loader.train_loader(sources=sources(tables, ([(0, 1.0), (7, 0)], [(0, 1.0), (7, 0)])), batch_size=8)
    late = sources(tables, ([(0, 0), (7, 1.0)], 1.0), few=dict(rows="texts"))
    with pytest.raises(UserError, match="the row set `texts` has the weight 0 at the first step"):
        loader.train_loader(sources=late, batch_size=8)


def test_examples_take_turns_and_every_epoch_of_a_source_has_all_of_it(tables):
    batches = loader.train_loader(sources=sources(tables), batch_size=8, seed=3)
    assert (batches.num_examples, batches.batches_per_epoch, batches.sizes) == (47, 5, 8)
    out = take(batches, 37)
    numbers = np.concatenate([batch["n"] for batch in out])
    assert (numbers < 10).reshape(-1, 4).tolist() == [[False, False, False, True]] * 74
    for own, size in ((numbers[numbers < 10], 10), (numbers[numbers >= 100], 37)):
        epochs = own[: len(own) // size * size].reshape(-1, size)
        assert len(epochs) >= 6
        assert {tuple(sorted(epoch)) for epoch in epochs.tolist()} == {tuple(sorted(set(own.tolist())))}
        assert len({tuple(epoch) for epoch in epochs.tolist()}) == len(epochs)
    assert (batches.read, batches.bad) == (296, 0)
    other = loader.train_loader(sources=sources(tables), batch_size=8, seed=4)
    assert plain(take(other, 1)) != plain(out[:1])


def test_a_source_gives_the_same_examples_in_any_mixture(tables):
    def few(**options):
        batches = take(loader.train_loader(seed=3, **options), 8)
        return [text for batch in batches for n, text in zip(batch["n"], batch["text"], strict=True) if n < 10][:15]

    expected = few(sources=sources(tables), batch_size=8)
    assert few(sources=sources(tables, (1 / 3, 2 / 3)), batch_size=9) == expected
    only = {"few": sources(tables)["few"]}
    assert few(sources=only, batch_size=5) == expected


def test_a_source_alone_is_not_a_mixture(tables):
    """Without `sources`, the seed is the run's own, and the last partial batch of an epoch is dropped."""
    batches = loader.train_loader(uri=tables["many"], ops=OPS, batch_size=8, seed=3)
    order = 100 + np.random.default_rng((3, 0)).permutation(37)
    np.testing.assert_array_equal(np.concatenate([batch["n"] for batch in take(batches, 4)]), order[:32])
    order = 100 + np.random.default_rng((3, 1)).permutation(37)
    np.testing.assert_array_equal(next(batches)["n"], order[:8])


ROWS = {"flat": {}, "row sets": {"few": dict(rows="texts")}}


@pytest.mark.parametrize(
    ("kind", "options"), [("flat", dict(threads=3)), ("row sets", {}), ("row sets", dict(workers=2))]
)
def test_resuming_equals_never_stopping(tables, kind, options):
    mixed = dict(sources=sources(tables, **ROWS[kind]), batch_size=8, seed=7)
    expected = plain(take(loader.train_loader(**mixed), 14))
    batches = loader.train_loader(**mixed, **options)
    assert plain(take(batches, 5)) == expected[:5]
    state = json.loads(json.dumps(batches.get_state()))
    assert state == {
        "batch": 5, "read": 40, "bad": 0, "kinds": {}, "batch_size": 8, "num_examples": 47, "seed": 7,
        "fingerprints": batches.fingerprints,
    }  # fmt: skip
    assert set(batches.fingerprints) == {"few", "many"}
    batches.close()
    again = loader.train_loader(**mixed)
    again.set_state(state)
    assert plain(take(again, 9)) == expected[5:]


def test_processes_share_the_batch_of_one_process(tables):
    mixed = dict(sources=sources(tables), batch_size=8, seed=7)
    expected = take(loader.train_loader(**mixed), 6)
    for rows in ([0, 1, 4, 5], [2, 3, 6, 7]):
        share = take(loader.train_loader(**mixed, rows=rows), 6)
        assert plain(share) == plain({key: array[rows] for key, array in batch.items()} for batch in expected)
    mixed["sources"] = sources(tables, **ROWS["row sets"])
    expected = take(loader.train_loader(**mixed), 6)
    for rows in ({"batch": [0, 1, 2], "texts": [0]}, {"batch": [3, 4, 5], "texts": [1]}):
        batches = loader.train_loader(**mixed, rows=rows)
        assert batches.rows == rows and batches.first_row == rows["texts"][0]
        wanted = [
            {name: {key: x[rows[name]] for key, x in part.items()} for name, part in batch.items()}
            for batch in expected
        ]
        assert plain(take(batches, 6)) == plain(wanted)
        assert batches.read == 24


def test_row_sets_have_sizes_and_fields_of_their_own(tables):
    mixed = sources(tables, **ROWS["row sets"])
    mixed["more"] = mixed["many"] | dict(weight=4.0)
    mixed["few"]["ops"] = "keep('n')"
    assert mixture.sizes(mixed, 16) == {"texts": 2, "batch": 14}
    batches = loader.train_loader(sources=mixed, batch_size=16)
    assert batches.sizes == {"texts": 2, "batch": 14}
    shapes = lambda batch: {name: {key: x.shape for key, x in part.items()} for name, part in batch.items()}
    assert shapes(next(batches)) == {"texts": {"n": (2,)}, "batch": {"n": (14,), "text": (14,)}}
    assert shapes(batches.example) == {"texts": {"n": (1,)}, "batch": {"n": (1,), "text": (1,)}}
    mixed = {"few": mixed["few"]}
    assert next(loader.train_loader(sources=mixed, batch_size=4)).keys() == {"texts"}
    assert mixture.sizes(None, 4) == 4 and mixture.sizes(sources(tables, (0.1, 0.2)), 4) == 4
    tenths = sources(tables, (0.1, 0.2), few=dict(rows="texts"))
    assert mixture.sizes(tenths, 6) == {"texts": 2, "batch": 4}  # 0.1 / (0.1 + 0.2) in floats is below a third


def test_a_bad_example_is_counted_named_and_replaced_by_one_of_its_source(tmp_path, caplog):
    tables = {"few": write(tmp_path, "few", range(10), n4="{"), "many": write(tmp_path, "many", range(100, 140))}
    batches = loader.train_loader(sources=sources(tables), batch_size=8)
    with caplog.at_level(logging.WARNING):
        out = take(batches, 10)  # two epochs of `few`
    assert [line for line in caplog.messages if line.startswith("bad example few/few.jsonl:5: not JSON")]
    assert batches.read == 80 + batches.bad and batches.bad >= 2
    numbers = np.concatenate([batch["n"] for batch in out])
    assert 4 not in numbers and (numbers < 10).sum() == 20
    strict = loader.train_loader(sources=sources(tables), batch_size=8, max_bad_fraction=0.0)
    with pytest.raises(UserError, match=r"bad, more than max_bad_fraction=0; the last is few/few.jsonl:5: not JSON"):
        take(strict, 10)


WRONG = {  # further keys of sections, the message
    "unknown key": (dict(few=dict(wieght=1)), "config.data.sources.few has no key `wieght`; did you mean `weight`"),
    "weight": (dict(few=dict(weight=0)), "config.data.sources.few.weight is 0; expected a number above 0"),
    "no keep": (dict(few=dict(ops="caption('words')")), "config.data.sources.few.ops should end with keep"),
    "fields": (
        dict(many=dict(ops="keep('words', 'n')")),
        r"the sources `few` and `many` fill the same rows and differ in `text`: object\[\] and none, "
        r"`words`: none and object\[\]; their ops must keep the same fields",
    ),
    "shares": (
        dict(few=dict(rows="texts", weight=0.75)),
        r"batch_size=8 gives the row set `texts` 1\.6 rows, by its weight 0\.75 of 3\.75; batch_size=10 works, as any "
        "multiple of 5",
    ),
    "few examples": (
        dict(few=dict(where={"n": (1, 2)}, weight=3.0)),
        r"few.jsonl` has 2 examples after where=\{'n': \(1, 2\)\}, fewer than its 4 of a batch of 8",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_a_user_gets_wrong_is_named(tables, what):
    change, message = WRONG[what]
    with pytest.raises(UserError, match=message) as error:
        loader.train_loader(sources=sources(tables, **change), batch_size=8)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"config.data.sources is \{\}; expected dict\(NAME=dict\(uri="),
        ({"few": "tfds:x"}, "config.data.sources.few is 'tfds:x'; expected dict"),
        ({"few": dict(ops=OPS)}, "config.data.sources.few lacks the key `uri`"),
    ],
)
def test_sections_of_sources_are_checked(given, message):
    with pytest.raises(UserError, match=message):
        mixture.sizes(given, 8)


def test_sources_stand_in_place_of_one_source(tables):
    with pytest.raises(UserError, match=r"config.data has `sources` and `ops`; give each source its own `ops`"):
        loader.train_loader(sources=sources(tables), ops=OPS, batch_size=8)
    with pytest.raises(UserError, match=r"config.data lacks the key `uri`, which has no default"):
        loader.train_loader(ops=OPS, batch_size=8)


def test_sources_that_number_labels_differently_are_refused(tmp_path):
    """Label 0 would be a cat in one source and a dog in the other."""
    for name, folders in (("a", ("cat", "dog")), ("b", ("dog", "elk")), ("c", ("cat", "dog", "elk"))):
        for folder in folders:
            (tmp_path / name / folder).mkdir(parents=True)
            (tmp_path / name / folder / "1.png").touch()
    section = lambda name: dict(uri=f"folder:{tmp_path / name}", ops="keep('label')")
    alike = loader.train_loader(sources=dict(a=section("a"), c=section("c")), batch_size=2)
    assert alike.example["label"].tolist() == [0], "one more class is no other number"
    with pytest.raises(UserError, match=r"`a` and `b` fill .* number `label` differently: 0 is `cat` and `dog`; give"):
        loader.train_loader(sources=dict(a=section("a"), b=section("b")), batch_size=2)
