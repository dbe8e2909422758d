"""Adapters after the towers: what they leave as it was, and what they cannot be."""

import numpy as np
import pytest

from tests.support.few_shot import NAMES, few_shot_task, moved, pictures, tuned
from vlm_jax.adapt.modules.after_towers import clip_adapter, multimodal_adapter
from vlm_jax.adapt.task import accuracy
from vlm_jax.errors import UserError


@pytest.mark.parametrize("make", [clip_adapter, multimodal_adapter])
def test_towers_stay_and_new_classes_are_named(base, make):
    """The parameters stand after the towers; cached embeddings give the accuracy of the pictures."""
    adapted = tuned(base, make(base.model), pictures(), templates=("{}",))
    assert all(name.startswith("inserted_") for name in moved(base, adapted))
    _, queries, _ = few_shot_task(base, pictures())
    others = [*NAMES[:2], "cat"]
    right = adapted.class_logits(queries.images, others).argmax(1) == queries.labels
    assert accuracy(base, adapted, queries, others) == np.mean(right)


def test_an_adapter_without_a_share_is_named(base):
    with pytest.raises(UserError, match="clip_adapter has no adapter"):
        clip_adapter(base.model, image_share=0.0)
