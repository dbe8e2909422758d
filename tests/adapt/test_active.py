"""Rounds of labels: what is asked for, that nothing else is seen, and the numbers of the protocol."""

import dataclasses

import numpy as np
import pytest

from tests.support.few_shot import few_shot_task
from vlm_jax import catalogue, evaluators
from vlm_jax.adapt import active, protocol
from vlm_jax.adapt.methods import fit
from vlm_jax.adapt.task import Shots
from vlm_jax.data import emoji
from vlm_jax.errors import UserError

TRUTH = np.array([2, 0, 1, 1, 0, 2, 2, 0])


@pytest.fixture
def task(base, pictures):
    return few_shot_task(base, pictures)


@pytest.fixture
def pool(base, pictures):
    images = pictures[0][:8]
    return Shots(images, base.embed_image_batch(images), np.full(8, -1))


def spent(base, pool, task, acquisition, budget=7, rounds=3):
    """(what was asked for, what the method got, what the strategy saw, what the rounds ended with)."""
    asked, given, seen = [], [], []
    plan = active.plan(budget=budget, rounds=rounds, acquisition=acquisition, pool=8)
    acquire = plan.acquire
    plan = plan._replace(acquire=lambda view, count, rng: (seen.append(view), acquire(view, count, rng))[1])

    def adapt(model, few, validation, about):
        given.append((few, about.pool))
        return fit("tip_adapter")(model, few, validation, about)

    ask = lambda rows: asked.append(rows.tolist()) or TRUTH[rows]
    learned = list(plan.learn(adapt, base, pool, ask, task[1], task[2]))
    return asked, given, seen, learned


def test_a_label_is_seen_only_when_asked_for(base, pool, task):
    asked, given, seen, learned = spent(base, pool, task, "entropy")
    assert [len(rows) for rows in asked] == [3, 2, 2]
    so_far = []
    for rows, (few, others), end in zip(asked, given, learned, strict=True):
        so_far += rows
        rest = [i for i in range(8) if i not in so_far]
        assert len(set(so_far)) == len(so_far)
        np.testing.assert_array_equal(few.labels, TRUTH[so_far])
        np.testing.assert_array_equal(few.images, pool.images[so_far])
        np.testing.assert_array_equal(others.images, pool.images[rest])
        assert (others.labels == -1).all() and (pool.labels == -1).all()
        assert end.rows.tolist() == so_far and end.labels.tolist() == TRUTH[so_far].tolist()
    for view, rows in zip(seen, (asked[0], asked[0] + asked[1]), strict=True):
        rest = [i for i in range(8) if i not in rows]
        np.testing.assert_array_equal(view.features, pool.features[rest])
        np.testing.assert_array_equal(view.labelled, pool.features[rows])
        np.testing.assert_array_equal(view.labels, TRUTH[rows])
    last = learned[1].adapted  # the strategy sees the logits of the model of the round before
    np.testing.assert_array_equal(seen[1].logits, last.head(seen[1].features))


def test_the_first_round_is_the_same_for_all_strategies(base, pool, task):
    first = {name: spent(base, pool, task, name, rounds=2)[0][0] for name in ("random", "entropy", "coreset")}
    assert len(set(map(tuple, first.values()))) == 1
    everything = spent(base, pool, task, "coreset", budget=8, rounds=2)
    assert sorted(row for rows in everything[0] for row in rows) == list(range(8)) and everything[1][-1][1] is None


def test_one_round_is_the_method_on_random_pictures(base, pool, task):
    """Exactly: the head of as many labelled pictures, drawn at random."""
    ((few, _),), (learned,) = spent(base, pool, task, None, budget=5, rounds=1)[1::2]
    wanted = fit("tip_adapter")(base, few, *task[1:]).head
    np.testing.assert_array_equal(learned.adapted.head(pool.features), wanted(pool.features))


def test_what_is_wrong_is_named(base, pool, task, monkeypatch):
    plan = lambda **given: active.plan(**dict(budget=4, rounds=2, acquisition=None, pool=8) | given)
    assert plan(budget=0, rounds=None) is None and plan(budget=5, rounds=3).sizes == (2, 2, 1)
    assert plan(rounds=None).sizes == (1, 1, 1, 1)
    for given, message in (
        (dict(budget=9), "the budget is 9 labels of a pool of 8 pictures; expected 1 to 8: raise pool"),
        (dict(budget=-1), "the budget is -1 labels of a pool of 8 pictures"),
        (dict(rounds=5), "5 rounds spend a budget of 4 labels; expected 1 to 4 rounds"),
        (dict(rounds=0), "0 rounds spend a budget of 4 labels"),
        (dict(budget=0), r"rounds and acquisition spend a budget of labels; give budget, too \(--budget=64\)"),
        (dict(acquisition="entropie"), "the acquisition of few_shot is `entropie`.*did you mean `entropy`"),
        (dict(acquisition={"name": "pcb", "shares": 1}), "the acquisition of few_shot has no key `shares`"),
    ):
        with pytest.raises(UserError, match=message) as error:
            plan(**given)
        assert "\n" not in str(error.value)
    labelled = pool._replace(labels=TRUTH)
    with pytest.raises(UserError, match="the pool to ask for labels of has 8 labels, which no method may see"):
        spent(base, labelled, task, "random")
    monkeypatch.setattr(catalogue, "_OWN", {})

    @catalogue.method(family="acquisitions", differs="the same picture twice")
    def twice():
        return lambda seen, count, rng: np.zeros(count, int)

    with pytest.raises(UserError, match=r"the strategy chose rows \[0, 0\]; expected 2 different ones below 5"):
        spent(base, pool, task, "twice")


CLASSES = dict(list(emoji.concepts(held_out=False).items())[:6])
CASE = dict(  # as in tests/adapt/test_protocol.py
    uri="tfds:emoji", split="unseen_style[540:560]", train_split="train[1870:1900]", label="concept", classes=CLASSES,
    where={"concept": list(CLASSES)}, train_where={"concept": list(CLASSES)}, shots=1, seeds=2, batch_size=16,
)  # fmt: skip


def test_the_protocol(two_tower):
    """Numbers after each round, and how even the labels are; zero-shot needs none of them."""
    build = lambda **more: evaluators.build(dict(type="few_shot", methods=["zero_shot", "tip_adapter"], **CASE | more))
    result = build(pool=6, budget=5, rounds=2, acquisition="random")(two_tower)
    numbers = result.metrics
    assert {"tip_adapter/top1", "tip_adapter/3_labels/top1", "tip_adapter/3_labels/spread"} <= numbers.keys()
    assert numbers["zero_shot/3_labels/top1"] == numbers["zero_shot/top1"]
    assert numbers["tip_adapter/imbalance"] == numbers["zero_shot/imbalance"] > 0
    assert "tip_adapter/3_labels/top1" in result.intervals
    assert active.imbalance(np.array([0, 0, 1, 2]), 3) == pytest.approx(np.std([2, 1, 1]) / (4 / 3))
    for more, message in (
        (dict(pool=2, budget=3), "the budget is 3 labels of a pool of 2"),
        (dict(seen=0), "seen is 0"),
    ):
        with pytest.raises(UserError, match=message):
            build(**more)


def test_classes_without_labels(two_tower, monkeypatch):
    """With seen < 1, the first classes have the labels, and the pool is of the others."""
    handed = []

    def adapt(base, shots, validation, task):
        handed.append((shots, validation, task))
        return dataclasses.replace(base, classes=tuple(task.names), templates=("{}",))

    monkeypatch.setattr(protocol, "fit", lambda name: adapt)
    whole = dict(CASE, methods=["coop"], seeds=1)
    evaluators.build(dict(type="few_shot", seen=0.5, pool=4, **whole))(two_tower)
    evaluators.build(dict(type="few_shot", **whole | dict(shots=9)))(two_tower)
    (shots, validation, task), (everything, rest, _) = handed
    pairs = lambda part: zip(part.features, part.labels, strict=True)
    label = {row.tobytes(): label for part in (everything, rest) for row, label in pairs(part)}
    assert set(shots.labels) == {0, 1, 2} and set(validation.labels) <= {0, 1, 2} and len(task.names) == 6
    assert {label[row.tobytes()] for row in task.pool.features} <= {3, 4, 5} and (task.pool.labels == -1).all()
