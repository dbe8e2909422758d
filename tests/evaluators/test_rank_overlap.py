"""Rank overlap: the metric in loops, and the evaluator on fifty scenes."""

import numpy as np
import pytest

from tests.support.scenes import Guess, records, run, seen
from vlm_jax import evaluators
from vlm_jax.errors import UserError
from vlm_jax.evaluators import metrics


def overlap_by_hand(first, second):
    shares = [len(set(first[:d]) & set(second[:d])) / d for d in range(1, len(first) + 1)]
    return np.mean(shares), len(set(first) & set(second)) / len(set(first) | set(second))


def test_overlap():
    rng = np.random.default_rng(0)
    first, second = (np.array([rng.permutation(12)[:5] for _ in range(20)]) for _ in range(2))
    want = np.array([overlap_by_hand(a, b) for a, b in zip(first, second, strict=True)]).T
    np.testing.assert_allclose(metrics.overlap(first, second), want)
    np.testing.assert_allclose(metrics.overlap(first, first), np.ones((2, 20)))
    np.testing.assert_allclose(metrics.overlap(first, first + 12), np.zeros((2, 20)))
    with pytest.raises(ValueError, match="two lists"):
        metrics.overlap(first, second[:, :3])


def test_the_evaluator_by_hand():
    guess, rows = Guess(), records()
    result = run("rank_overlap", guess, ks=(5, 10))
    pictures = guess.embed_image_batch([seen(row["image"]) for row in rows])
    best = lambda text, k: np.argsort(-(pictures @ guess.embed_texts([text])[0]), kind="stable")[:k]
    for k in (5, 10):
        pairs = [overlap_by_hand(best(row["caption"], k), best(row["long_caption"], k)) for row in rows]
        for name, value in zip(("average_overlap", "jaccard"), np.mean(pairs, axis=0), strict=True):
            np.testing.assert_allclose(result.metrics[f"{name}@{k}"], value)
    assert result.metrics["examples"] == 50
    same = run("rank_overlap", guess, queries=("caption", "caption")).metrics
    assert same["average_overlap@10"] == same["jaccard@10"] == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(queries=("a", "b", "c")), "rank_overlap: queries is .*; expected the fields of a query and of its"),
        (dict(template="a photo"), "template `a photo` has no `{}` for the text"),
        (dict(ks=(0,)), r"ks are \[0\]; expected lengths of 1 or more"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(UserError, match=message):
        evaluators.build({"type": "rank_overlap", "uri": "scenes:", **options})


def test_pictures_without_two_texts_are_named():
    with pytest.raises(UserError, match="no picture has two texts under caption"):
        run("rank_overlap", Guess(), queries="caption")
