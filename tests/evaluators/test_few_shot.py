"""Few shots on the embedded data: what is drawn, that it is only drawn from training pictures, and the numbers."""

import math

import numpy as np
import pytest

from vlm_jax import evaluators
from vlm_jax.adapt import heads
from vlm_jax.adapt.methods import METHODS
from vlm_jax.data import emoji
from vlm_jax.data.sources import open_source
from vlm_jax.errors import UserError
from vlm_jax.pretrained import class_embeddings

CLASSES = dict(list(emoji.concepts(held_out=False).items())[:6])
CASE = dict(
    uri="tfds:emoji", split="unseen_style", label="concept", classes=CLASSES, where={"concept": list(CLASSES)},
    train_where={"concept": list(CLASSES)}, shots=2, seeds=2, batch_size=16,
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
    features, labels = embedded(two_tower, "unseen_style")
    text = class_embeddings(two_tower.embed_texts, list(CLASSES.values()), ["{}"])
    head = heads.zero_shot(text, math.exp(float(two_tower.params["logit_scale"])))
    assert result["zero_shot/top1"] == pytest.approx(np.mean(head(features).argmax(1) == labels))
    assert result["zero_shot/spread"] == 0 and result["examples"] == len(labels)
    again = evaluators.build(dict(type="few_shot", methods=methods[:2], **CASE | dict(batch_size=5)))(two_tower).metrics
    assert all(again[name] == result[name] for name in again)
    assert all(0 <= result[f"{method}/top1"] <= 1 for method in methods)


def test_trained_heads_learn_the_pictures_they_are_given(two_tower):
    """Tested on its own training pictures, a cache names them better than the class names of an untrained model."""
    case = CASE | dict(split="train", shots=4, seeds=1, methods=["zero_shot", "tip_adapter", "gda"])
    result = evaluators.build(dict(type="few_shot", **case))(two_tower).metrics
    assert min(result["tip_adapter/top1"], result["gda/top1"]) > result["zero_shot/top1"] + 0.2


def test_what_is_wrong_is_named(two_tower, captioner):
    build = lambda **changes: evaluators.build(dict(type="few_shot", **CASE | changes))
    with pytest.raises(UserError, match="a method of few_shot is `coup`; expected one of: zero_shot"):
        build(methods=["coup"])
    with pytest.raises(UserError, match="wants shots and seeds of 1 or more; got 0 and 2"):
        build(shots=0)
    with pytest.raises(UserError, match="compares embeddings, which a captioner has none of"):
        build()(captioner)
    assert set(METHODS) >= {"gda", "tip_adapter_f", "tip_x", "cross_modal_probe"}
