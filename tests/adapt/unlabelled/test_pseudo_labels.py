"""Pseudo-labels against loops, in float64: the most probable of each class, names' directions, label propagation."""

import numpy as np
import pytest

from tests.support.few_shot import unit_rows
from vlm_jax.adapt.unlabelled.pseudo_labels import (
    by_neighbours,
    propagated,
    top_of_each_class,
    without_first_directions,
)
from vlm_jax.errors import UserError
from vlm_jax.pretrained import unit


def test_top_of_each_class_by_hand():
    logits = 3 * np.random.default_rng(0).normal(size=(9, 4))
    logits[3] = logits[5]  # a tie goes to the first row
    for classes in (None, np.array([3, 1])):
        own = np.arange(4) if classes is None else classes
        wanted = []
        for c in own:
            shares = [np.exp(row[c]) / sum(np.exp(row[j]) for j in own) for row in logits]
            wanted += [(row, c) for row in sorted(range(9), key=lambda row, shares=shares: (-shares[row], row))[:3]]
        rows, labels = top_of_each_class(logits, 3, classes)
        assert list(zip(rows, labels, strict=True)) == wanted
    rows, labels = top_of_each_class(logits, 9)
    assert (np.bincount(rows), np.bincount(labels)) == (pytest.approx(4), pytest.approx(9))
    for k in (0, 10):
        with pytest.raises(UserError, match=f"{k} pseudo-labels for each class of 9 pictures; expected 1 to 9"):
            top_of_each_class(logits, k)


def test_directions_of_the_names():
    """Against the eigenvectors of text' text; without the first one, the names' common direction is gone."""
    shared = unit_rows(0, 6)
    text = shared + 0.1 * unit_rows(1, 4, 6)
    text = unit(text)
    values, vectors = np.linalg.eigh(text.T @ text)
    order = np.argsort(-values)[:4]
    for drop, rank in ((0, None), (1, None), (1, 3)):
        kept = vectors[:, order[drop:rank]]
        found = without_first_directions(text, drop, rank)
        np.testing.assert_allclose(found, kept @ kept.T, atol=1e-9)
    cosines = lambda x: (
        (x / np.linalg.norm(x, axis=1, keepdims=True)) @ (x / np.linalg.norm(x, axis=1, keepdims=True)).T
    )
    assert cosines(text).min() > 0.8 > 0.5 > cosines(text @ without_first_directions(text))[0, 1:].max()
    np.testing.assert_allclose(without_first_directions(unit_rows(2, 9, 6), 0), np.eye(6), atol=1e-12)
    with pytest.raises(UserError, match="drop is 4, of 4 directions of the names; expected fewer"):
        without_first_directions(text, 4)


def test_propagation_by_hand():
    """The closed form is the sum of the labels' walks along the edges."""
    text, features, k, alpha = unit_rows(3, 3, 5), unit_rows(4, 8, 5), 4, 0.6
    points = np.concatenate([text, features])
    kept = np.zeros((11, 11))
    for i in range(11):
        affinities = [(1 + points[i] @ points[j]) / 2 if j != i else -1.0 for j in range(11)]
        for j in sorted(range(11), key=lambda j, affinities=affinities: -affinities[j])[:k]:
            kept[i, j] = affinities[j]
    weights = (kept + kept.T) / 2
    walk = weights / np.sqrt(np.outer(weights.sum(0), weights.sum(0)))
    scores = step = np.eye(11, 3)
    for _ in range(200):
        step = alpha * walk @ step
        scores = scores + step
    found = propagated(features, text, k, alpha)
    np.testing.assert_allclose(found, scores, atol=1e-9)
    np.testing.assert_array_equal(by_neighbours(features, text, None, k, alpha), scores[3:].argmax(1))
    with pytest.raises(UserError, match="label propagation has k 0, alpha 1; expected 1 or more, and 0 to less than 1"):
        propagated(features, text, 0, 1)


def test_one_step_to_all_names_is_the_nearest_name():
    """But for the names' own degrees, zero-shot: names in the midst of the pictures count less."""
    text, features = np.eye(6)[:4], unit_rows(5, 30, 6)
    found = by_neighbours(features, text, None, k=99, alpha=1e-9)
    affinity = (1 + features @ text.T) / 2
    degrees = (1 + text @ np.concatenate([text, features]).T).sum(1) / 2 - 1
    np.testing.assert_array_equal(found, (affinity / np.sqrt(degrees)).argmax(1))
    assert np.mean(found == (features @ text.T).argmax(1)) > 0.9
