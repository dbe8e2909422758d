"""Class-aware prompts: the loss of the classifiers, and what cannot be."""

from types import SimpleNamespace

import numpy as np
import pytest

from tests.support.few_shot import NAMES, clip_like
from vlm_jax.adapt.prompts.class_aware import class_aware_prompts
from vlm_jax.errors import UserError


def test_classifiers_learn_from_the_prompts_of_the_pictures_class():
    """The mean over pictures, blocks and prompts whose class is the picture's; 0 where no prompt is."""
    model = clip_like(scan=True).model
    (term,) = class_aware_prompts(model, weight=0.5).terms(SimpleNamespace(names=NAMES, rows={}))
    assert term.weight == 0.5
    losses, chosen = np.random.default_rng(0).random((3, 2, 2)), np.array([[0, 2], [1, 0], [2, 1]])
    own = np.broadcast_to((chosen == np.array([2, 1, 0])[:, None])[:, None], losses.shape)
    want = np.mean([losses[i, j, k] for i, k in ((0, 1), (1, 0)) for j in range(2)])
    np.testing.assert_allclose(term.loss(None, (losses, own), None, None)[0], want, rtol=1e-6)
    assert term.loss(None, (losses, np.zeros_like(own)), None, None)[0] == 0
    assert class_aware_prompts(model, weight=0.0).terms == ()


def test_what_does_not_fit_is_named():
    with pytest.raises(UserError, match="`blocks` is 3; expected 1 to 2, of 3 blocks"):
        class_aware_prompts(clip_like(scan=True).model, blocks=3)
