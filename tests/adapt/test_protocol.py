"""Few shots on the embedded data: what is drawn, that it is only drawn from training pictures, and the numbers."""

import dataclasses
import math

import numpy as np
import pytest

from vlm_jax import catalogue, evaluators
from vlm_jax.adapt import heads, methods, protocol
from vlm_jax.adapt.methods import options_of
from vlm_jax.adapt.protocol import _intervals, _summary
from vlm_jax.adapt.recipe import Extended, Masked
from vlm_jax.data import emoji
from vlm_jax.data.sources import open_source
from vlm_jax.errors import UserError
from vlm_jax.objectives import Term
from vlm_jax.pretrained import class_embeddings

CLASSES = dict(list(emoji.concepts(held_out=False).items())[:6])
CASE = dict(  # the slices hold all pictures of the six classes
    uri="tfds:emoji", split="unseen_style[540:560]", train_split="train[1870:1900]", label="concept", classes=CLASSES,
    where={"concept": list(CLASSES)}, train_where={"concept": list(CLASSES)}, shots=2, seeds=2, batch_size=16,
)  # fmt: skip


def embedded(two_tower, split):
    """(embeddings, class indices) of all pictures of the six classes."""
    source = open_source("tfds:emoji", split)
    records = [source[i] for i in range(len(source))]
    records = [record for record in records if record["concept"] in CLASSES]
    labels = [list(CLASSES).index(record["concept"]) for record in records]
    return two_tower.embed_images([record["image"] for record in records]), np.array(labels)


def test_methods(two_tower):
    """Zero-shot is that of the embeddings; the same numbers again; every method's are shares."""
    methods = ["zero_shot", "gda", "tip_adapter", "linear_probe"]
    result = evaluators.build(dict(type="few_shot", methods=methods, **CASE))(two_tower).metrics
    features, labels = embedded(two_tower, CASE["split"])
    text = class_embeddings(two_tower.embed_texts, list(CLASSES.values()), ["{}"])
    head = heads.zero_shot(text, math.exp(float(two_tower.params["logit_scale"])))
    assert result["zero_shot/top1"] == pytest.approx(np.mean(head(features).argmax(1) == labels))
    assert result["zero_shot/spread"] == 0 and result["examples"] == len(labels)
    again = evaluators.build(dict(type="few_shot", methods=methods[:2], **CASE | dict(batch_size=5)))(two_tower).metrics
    assert all(again[name] == result[name] for name in again)
    assert all(0 <= result[f"{method}/top1"] <= 1 for method in methods)


def test_trained_heads_learn_the_pictures_they_are_given(two_tower):
    """Tested on its own training pictures, a cache names them better than the class names of an untrained model."""
    where = {"concept": list(CLASSES)[::-1]}  # the same pictures
    case = CASE | dict(
        split=CASE["train_split"], where=where, shots=4, seeds=1, methods=["zero_shot", "tip_adapter", "gda"]
    )
    result = evaluators.build(dict(type="few_shot", **case))(two_tower).metrics
    assert min(result["tip_adapter/top1"], result["gda/top1"]) > result["zero_shot/top1"] + 0.2


def test_a_head_of_your_own(two_tower, monkeypatch):
    monkeypatch.setattr(catalogue, "_OWN", {})

    @catalogue.method(family="heads", differs="always the same class")
    def always(features, text, *, chosen: int = 0):
        return lambda queries: np.eye(len(text))[np.full(len(queries), chosen)]

    build = lambda **options: evaluators.build(dict(type="few_shot", methods=["always"], options=options, **CASE))
    labels = embedded(two_tower, CASE["split"])[1]
    assert build(chosen=2)(two_tower).metrics["always/top1"] == pytest.approx(np.mean(labels == 2))
    with pytest.raises(UserError, match="the method always has no option `choice`; expected one of: chosen"):
        build(choice=2)


def test_a_pool_is_apart_from_all_draws(two_tower, monkeypatch):
    """Its pictures have no label, reach the recipes with a term on "pool", and leave the other pictures as they are."""
    seen, tuned = {}, []
    nothing = Extended(Masked("bias"), (Term("nothing", lambda outputs, ctx: 0, lambda *_: (0, {}), on="pool"),))

    def tune(base, recipe, images, *_, pool=None, **options):
        tuned.append(pool)
        return dataclasses.replace(base, classes=tuple(CLASSES.values()), templates=("{}",))

    def adapt(base, shots, validation, task):
        seen.setdefault(task.seed, []).append((shots, validation, task))
        adapted = [methods.search_rate(r, base, shots, validation, task) for r in (nothing, Masked("bias"))]
        return adapted[0]

    monkeypatch.setattr(methods, "tune", tune)
    monkeypatch.setattr(protocol, "fit", lambda name: adapt)
    case = CASE | dict(shots=1, methods=["coop"])
    for size in (0, 3):
        evaluators.build(dict(type="few_shot", pool=size, **case))(two_tower)
    rows = lambda shots: {row.tobytes() for row in shots.features}
    labelled = set().union(*(rows(part) for draws in seen.values() for part in draws[1][:2]))
    for draws in seen.values():
        (few, validation, task), (few_again, validation_again, with_pool) = draws
        assert task.pool is None and with_pool.pool.labels.tolist() == [-1] * 3
        assert rows(few) == rows(few_again) and rows(validation) == rows(validation_again)
        assert len(rows(with_pool.pool)) == 3 and not rows(with_pool.pool) & labelled
    assert rows(seen[0][1][2].pool) != rows(seen[1][1][2].pool)
    rates = len(methods.LEARNING_RATES)
    handed = tuned[4 * rates :]
    for seed in seen:
        own = handed[2 * rates * seed :]
        assert all(pool is seen[seed][1][2].pool.images for pool in own[:rates])
        assert own[rates : 2 * rates] == [None] * rates


def test_what_is_wrong_is_named(two_tower, captioner):
    build = lambda **changes: evaluators.build(dict(type="few_shot", **CASE | changes))
    with pytest.raises(UserError, match=r"a method of few_shot is `coup`.*did you mean `coop`"):
        build(methods=["coup"])
    with pytest.raises(UserError, match="no training picture's `concept` is among the classes"):
        build(classes=["pink"])(two_tower)
    with pytest.raises(UserError, match="wants shots and seeds of 1 or more; got 0 and 2"):
        build(shots=0)
    with pytest.raises(UserError, match="wants a pool of 0 pictures or more; got -1"):
        build(pool=-1)
    with pytest.raises(
        UserError, match=r"the pool is 99 pictures, but \d+ training pictures are in no draw; a smaller"
    ):
        build(pool=99)(two_tower)
    with pytest.raises(UserError, match="test `split` would name the pictures that are trained on"):
        build(split="train[1870:1900]")
    with pytest.raises(UserError, match="the test `far` of few_shot has no key `splits`; did you mean `split`"):
        build(tests={"far": dict(splits="near_style")})
    with pytest.raises(UserError, match="gda has no option `rank`; expected one of: alpha, shrinkage, prior"):
        build(methods=["gda"], options={"rank": 2})
    with pytest.raises(UserError, match="compares embeddings, and a captioner has none"):
        build()(captioner)


def test_harmonic_means_and_further_tests(two_tower):
    half, quarter, right = np.array([1.0, 0.0, 1.0, 0.0]), np.array([1.0, 0.0, 0.0, 0.0]), np.ones(4)
    shares = {("coop", ""): [half, right], ("coop", "new"): [quarter, half], ("gda", ""): [half]}
    numbers, intervals = _summary(shares), _intervals(shares)
    assert numbers["coop/harmonic_mean"] == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert numbers["coop/new/spread"] == pytest.approx(np.std([0.25, 0.5], ddof=1))
    assert not {"gda/harmonic_mean", "gda/spread"} & numbers.keys(), "one draw has no deviation"
    assert intervals.keys() == {"coop/top1", "coop/new/top1", "coop/harmonic_mean", "gda/top1"}
    assert all(low < numbers[name] < high for name, (low, high) in intervals.items())
    near = dict(split="near_style[290:300]", where={"concept": list(CLASSES)})
    reverse = dict(classes=dict(reversed(CLASSES.items())))  # columns of a head stand in another order
    unknown = dict(classes={**CLASSES, 999: "unknown"})
    tests = {"near": near, "reverse": reverse, "unknown": unknown}
    case = CASE | dict(methods=["zero_shot", "gda"], seeds=1, tests=tests)
    found = evaluators.build(dict(type="few_shot", **case))(two_tower)
    result = found.metrics
    assert result["zero_shot/reverse/top1"] == result["zero_shot/top1"]
    assert result["gda/reverse/top1"] == result["gda/top1"], "by name"
    assert "gda/near/top1" in result and "gda/unknown/top1" not in result and "gda/spread" not in result
    assert found.intervals["gda/top1"][0] < result["gda/top1"] < found.intervals["gda/top1"][1]
    assert "test `unknown`: 1 of 7 classes have no picture: unknown" in found.notes


def test_fewer_shots_are_said(two_tower):
    found = evaluators.build(dict(type="few_shot", methods=["zero_shot"], **CASE | dict(shots=9)))(two_tower)
    assert found.notes[0].startswith(
        "6 of 6 classes do not have 9 training pictures: orangutan (2), service dog (2), gorilla (3), "
    )


def test_options_of_one_method():
    options = {"lora.steps": 20, "steps": 100, "learning_rate": 1e-2}
    common = {"steps": 100, "learning_rate": 1e-2}
    assert options_of(["lora", "coop"], options) == {"lora": common | {"steps": 20}, "coop": common}
    with pytest.raises(UserError, match=r"option `lore\.steps` is `lore`; expected one of: lora, coop"):
        options_of(["lora", "coop"], {"lore.steps": 3})
    with pytest.raises(UserError, match="the method coop has no option `rank`"):
        options_of(["lora", "coop"], {"lora.rank": 4, "coop.rank": 4})
