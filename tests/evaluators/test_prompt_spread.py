"""Accuracy under each template alone, against as many zero-shot evaluations."""

import itertools

import numpy as np
import pytest

from configs import clip
from tests.support.models import untrained
from vlm_jax import evaluators
from vlm_jax.errors import UserError

TEMPLATES = ["{}", "my {}, drawn"]
CLASSES = {0: "grinning face", 570: "monkey", 571: "gorilla", 575: "dog"}
DATA = dict(uri="tfds:emoji", split="unseen_style[:600]", label="concept", classes=CLASSES, batch_size=8)
DATA["where"] = {"concept": list(CLASSES)}


def test_each_template_is_a_zero_shot_evaluation():
    model = untrained(clip.get_config("smoke"))
    found = evaluators.build(dict(type="prompt_spread", templates=TEMPLATES) | DATA)(model)
    alone = [evaluators.build(dict(type="zeroshot", templates=[t], gallery=0) | DATA)(model) for t in TEMPLATES]
    accuracy = np.array([result.metrics["top1"] for result in alone])
    np.testing.assert_allclose(found.artifacts["templates"]["accuracy"], accuracy, rtol=1e-6)
    by_hand = dict(mean=accuracy.mean(), worst=min(accuracy), best=max(accuracy), spread=np.std(accuracy))
    predicted = [result.artifacts["predictions"]["predicted"] for result in alone]
    by_hand["agreement"] = np.mean([a == b for a, b in itertools.combinations(predicted, 2)])
    for name, value in by_hand.items():
        np.testing.assert_allclose(found.metrics[name], value, rtol=1e-6, err_msg=name)
    assert found.metrics["templates"] == 2 and found.metrics["examples"] == alone[0].metrics["examples"]


def test_what_it_cannot_do_is_named():
    with pytest.raises(UserError, match="prompt_spread has 1 template; expected at least two"):
        evaluators.build(dict(type="prompt_spread", templates="a {}") | DATA)
