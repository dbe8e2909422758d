"""DAPT's losses against loops."""

import math

import numpy as np
import pytest

from tests.support.few_shot import Said, clip_like, loss_of, unit_rows
from vlm_jax.adapt.prompts.dispersed import dapt

X, TEXT, PROTOTYPES = unit_rows(0, 4, 8), unit_rows(1, 5, 8), 0.7 * unit_rows(2, 5, 8)
LABELS = np.array([3, -1, 0, 3])


@pytest.mark.parametrize("classes", [5, 1])
def test_dapt_is_the_papers(classes):
    """The mean of exp(-2 |w_i - w_j|^2) over pairs, of no pair 0; the mean square of z - s_y."""
    recipe = dapt(clip_like(scan=True).model)
    inter, intra = recipe.terms
    assert (inter.weight, intra.weight) == (0.1, 0.1)
    labels = np.where(LABELS < 0, -1, LABELS % classes)
    said = {
        "batch": Said(image_embedding=X, label=labels),
        "classes": Said(text_embedding=TEXT[:classes], prototype=PROTOTYPES[:classes]),
    }
    pairs = [math.exp(-2 * sum((TEXT[i] - TEXT[j]) ** 2)) for i in range(classes) for j in range(i)]
    np.testing.assert_allclose(loss_of(inter, said, said), np.mean(pairs) if pairs else 0.0, rtol=1e-6)
    squares = [(X[i, e] - PROTOTYPES[labels[i], e]) ** 2 for i in (0, 2, 3) for e in range(8)]
    np.testing.assert_allclose(loss_of(intra, said, said), np.mean(squares), rtol=1e-6)


def test_a_loss_without_weight_is_left_out():
    recipe = dapt(clip_like(scan=True).model, inter_weight=0.0, intra_weight=0.0)
    assert not recipe.terms and not recipe.tables
