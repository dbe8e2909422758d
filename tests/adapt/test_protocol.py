"""Few shots on the embedded data: what is drawn, that it is only drawn from training pictures, and the numbers."""

import math

import numpy as np
import pytest

from vlm_jax import evaluators
from vlm_jax.adapt import heads
from vlm_jax.adapt.protocol import _summary
from vlm_jax.data import emoji
from vlm_jax.data.sources import open_source
from vlm_jax.errors import UserError
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


def test_what_is_wrong_is_named(two_tower, captioner):
    build = lambda **changes: evaluators.build(dict(type="few_shot", **CASE | changes))
    with pytest.raises(UserError, match=r"a method of few_shot is `coup`.*did you mean `coop`"):
        build(methods=["coup"])
    with pytest.raises(UserError, match="no training picture's `concept` is among the classes"):
        build(classes=["pink"])(two_tower)
    with pytest.raises(UserError, match="wants shots and seeds of 1 or more; got 0 and 2"):
        build(shots=0)
    with pytest.raises(UserError, match="test `split` would name the pictures that are trained on"):
        build(split="train[1870:1900]")
    with pytest.raises(UserError, match="the test `far` of few_shot has no key `splits`; did you mean `split`"):
        build(tests={"far": dict(splits="near_style")})
    with pytest.raises(UserError, match="gda has no option `rank`; expected one of: alpha, shrinkage, prior"):
        build(methods=["gda"], options={"rank": 2})
    with pytest.raises(UserError, match="compares embeddings, and a captioner has none"):
        build()(captioner)


def test_harmonic_means_and_further_tests(two_tower):
    numbers = _summary({("coop", ""): [0.5, 1.0], ("coop", "new"): [0.25, 0.5], ("gda", ""): [0.5, 0.5]})
    assert numbers["coop/harmonic_mean"] == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert (
        numbers["coop/new/spread"] == pytest.approx(np.std([0.25, 0.5], ddof=1)) and "gda/harmonic_mean" not in numbers
    )
    near = dict(split="near_style[290:300]", where={"concept": list(CLASSES)})
    reverse = dict(classes=dict(reversed(CLASSES.items())))  # columns of a head stand in another order
    case = CASE | dict(methods=["zero_shot", "gda"], seeds=1, tests={"near": near, "reverse": reverse})
    result = evaluators.build(dict(type="few_shot", **case))(two_tower).metrics
    assert result["zero_shot/reverse/top1"] == result["zero_shot/top1"]
    assert "gda/near/top1" in result and "gda/reverse/top1" not in result
