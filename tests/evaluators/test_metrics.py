"""Metrics against hand-computed numbers, brute force and the golden retrieval recalls."""

import fractions
import itertools
import pathlib

import numpy as np
import pytest

from vlm_jax.evaluators import metrics
from vlm_jax.evaluators.metrics import mean_per_class_accuracy, retrieval_recall, top_k_accuracy, truth_ranks
from vlm_jax.pretrained.similarity import similarity

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def test_top_k_by_hand():
    logits = np.array([[0.1, 0.9, 0.5], [0.7, 0.2, 0.1], [0.3, 0.2, 0.1], [9.0, 0.0, 0.0]])
    labels = np.array([1, 2, 1, 0])
    assert truth_ranks(logits, labels).above.tolist() == [0, 2, 1, 0]
    assert [top_k_accuracy(logits, labels, k=k) for k in (1, 2, 3)] == [0.5, 0.75, 1.0]
    mask = np.array([True, True, True, False])
    assert top_k_accuracy(logits, np.array([1, 2, 1, -7]), mask) == 1 / 3, "a masked label may be anything"


def orders(scores):
    """All orders of the candidates that a sort may give, from the highest score on."""
    places = range(len(scores))
    falls = lambda order: all(scores[i] >= scores[j] for i, j in itertools.pairwise(order))
    return [order for order in itertools.permutations(places) if falls(order)]


def test_ties_count_with_their_expected_value():
    """The mean over all orders of equal scores, of several right candidates, too."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        scores, right = rng.integers(0, 3, 6).astype(np.float32), rng.random(6) < 0.4
        right[0] = True
        best = scores[right].max()
        ranks = metrics.Ranks(
            np.array([(scores > best).sum()]),
            np.array([((scores == best) & ~right).sum()]),
            np.array([((scores == best) & right).sum()]),
        )
        every = orders(scores)
        for k in range(7):
            expected = np.mean([right[list(order[:k])].any() for order in every])
            assert ranks.within(k)[0] == pytest.approx(expected, abs=1e-12)


def test_ranks_do_not_depend_on_the_order_of_candidates():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, (3000, 7)).astype(np.float32)  # many ties, more rows than fit one chunk
    truth, order = rng.integers(0, 7, 3000), rng.permutation(7)
    ranks, moved = truth_ranks(scores, truth), truth_ranks(scores[:, order], np.argsort(order)[truth])
    assert all(np.array_equal(one, other) for one, other in zip(ranks, moved, strict=True))
    assert np.array_equal(ranks.above, (scores > scores[np.arange(3000), truth][:, None]).sum(1)) and ranks.ties > 1000
    assert truth_ranks(np.zeros((1, 8)), np.array([0])).within(2).tolist() == [0.25], "nobody knows more than chance"


def test_a_diverged_model_gets_nothing_right():
    assert top_k_accuracy(np.full((2, 3), np.nan), np.array([0, 1]), k=3) == 0.0
    assert top_k_accuracy(np.full((2, 3), np.nan), np.array([0, 1]), k=9) == 0.0


def test_mean_per_class_by_hand():
    correct = np.array([True, False, True, True, False])
    labels = np.array([0, 0, 2, 2, 1])
    mean, per_class = mean_per_class_accuracy(correct, labels, 4, mask=np.array([1, 1, 1, 1, 0], bool))
    assert mean == 0.75
    np.testing.assert_array_equal(per_class, [0.5, np.nan, 1.0, np.nan])


def test_confusions_by_count_then_sureness():
    labels = np.array([0, 0, 1, 2, 2, 1])
    predicted = np.array([1, 1, 2, 0, 2, 0])
    margins = np.array([0.1, 0.1, 0.2, 0.9, 0.0, 0.3])
    assert metrics.confusions(predicted, labels, margins) == [(0, 1, 2), (2, 0, 1), (1, 0, 1), (1, 2, 1)]
    assert metrics.confusions(labels, labels) == []


def test_retrieval_matches_golden():
    golden = np.load(GOLDEN / "retrieval.npz")
    recall = retrieval_recall(-golden["dist"], golden["corr"])
    for ours, theirs in (("image_to_text", "i2t"), ("text_to_image", "t2i")):
        for k in (1, 5, 10):
            assert recall[f"{ours}/recall@{k}"] == pytest.approx(golden[f"{theirs}_Recall@{k}"], abs=1e-12)


def brute_force(similarity, right, k):
    """(image to text, text to image): the mean over all orders of equal scores, of the queries with a hit."""
    recall = lambda scores, right: np.mean(
        [np.mean([own[list(order[:k])].any() for order in orders(row)]) for row, own in zip(scores, right, strict=True)]
    )
    return recall(similarity, right), recall(similarity.T, right.T)


@pytest.mark.parametrize("identical", [False, True])
def test_retrieval_matches_brute_force(identical, monkeypatch):
    """Uneven captions, ties, identical texts; and blocks change nothing."""
    rng = np.random.default_rng(1)
    owner = rng.permutation(np.concatenate([np.arange(4), rng.integers(0, 4, 3)]))
    ids = np.array([7, 7, 3, 1, 2, 3, 9])
    similarity = rng.integers(0, 3, (4, 7)).astype(np.float64)
    right = owner == np.arange(4)[:, None]
    if identical:
        right = np.array([[np.any(ids[owner == i] == one) for one in ids] for i in range(4)])
    for _ in range(2):
        recall = retrieval_recall(similarity, owner, ks=(1, 3), text_ids=ids if identical else None)
        for k in (1, 3):
            by_image, by_text = brute_force(similarity, right, k)
            assert recall[f"image_to_text/recall@{k}"] == pytest.approx(by_image, abs=1e-12)
            assert recall[f"text_to_image/recall@{k}"] == pytest.approx(by_text, abs=1e-12)
        monkeypatch.setattr(metrics.ranking, "ROWS", 3)
        monkeypatch.setattr(metrics.ranking, "COLUMNS", 2)


def test_blocks_change_nothing(monkeypatch):
    rng = np.random.default_rng(2)
    images, texts = rng.integers(-2, 3, (9, 4)), rng.integers(-2, 3, (23, 4))  # many equal similarities
    pairs = metrics.Pairs(
        9, rng.permutation(np.concatenate([np.arange(9), rng.integers(0, 9, 14)])), np.arange(23) // 2
    )
    matrix = similarity(images.astype(np.float32), texts.astype(np.float32))
    whole = metrics.retrieval_ranks(lambda i, t: matrix[i, t], pairs)
    order = np.argsort(-matrix, axis=1, kind="stable")
    asked = []

    def scores(i, t):
        asked.append((i.stop - i.start, t.stop - t.start))
        return similarity(images[i].astype(np.float32), texts[t].astype(np.float32))

    monkeypatch.setattr(metrics.ranking, "ROWS", 4)
    monkeypatch.setattr(metrics.ranking, "COLUMNS", 5)
    blockwise = metrics.retrieval_ranks(scores, pairs)
    assert all(np.array_equal(whole[name], blockwise[name]) for name in whole)
    index, best = metrics.top_k(scores, 9, 23, 7)
    assert np.array_equal(index, order[:, :7])
    assert np.array_equal(best, np.take_along_axis(matrix, order, 1)[:, :7])
    assert max(asked) <= (4, 5), "never the whole matrix"
    assert metrics.top_k(scores, 9, 3, 7)[0].shape == (9, 3), "fewer candidates than k"


def test_average_precision_is_the_mean_over_orders():
    rng = np.random.default_rng(0)
    precision = lambda right: np.mean((np.cumsum(right) / np.arange(1, 7))[right])
    for _ in range(20):
        scores, relevant = rng.integers(0, 3, 6).astype(float), rng.random(6) < 0.5
        relevant[0] = True
        expected = np.mean([precision(relevant[list(order)]) for order in orders(scores)])
        assert metrics.average_precision(scores, relevant) == pytest.approx(expected, abs=1e-12)
    mean, each = metrics.mean_average_precision(
        np.array([[3.0, 1, 0], [2, 2, 0]]), np.array([[1, 1, 0], [0, 0, 0]], bool)
    )
    assert mean == 0.75 and each[:2].tolist() == [1.0, 0.5] and np.isnan(each[2])


def test_intervals_tell_24_pictures_from_732():
    """Close to Clopper and Pearson's (scipy), of width above 0 where all are right, and the same each time."""
    for right, count, low, high in ((20, 24, 0.626, 0.953), (610, 732, 0.804, 0.860), (24, 24, 0.858, 1.0)):
        found = metrics.interval(np.arange(count) < right)
        np.testing.assert_allclose(found, (low, high), atol=0.04)
        assert found == metrics.interval(np.arange(count) < right) and found[0] < right / count <= found[1]
    low, high = metrics.interval(np.arange(732) < 732)
    assert 0.99 < low < high == 1.0


def test_a_perfect_ranking_of_few_is_no_certainty():
    """The interval of a perfect mean average precision is that of a share."""
    for count in (2, 24, 732):
        relevant = np.eye(2, dtype=bool)[np.arange(count) % 2]
        empty = np.zeros((1, 2), bool)  # a picture without a class says nothing of the others
        perfect, relevant = np.concatenate([relevant, empty]) - 1.0, np.concatenate([relevant, empty])
        found = metrics.percentiles(metrics.resampled_map(perfect, relevant))
        assert found == pytest.approx(metrics.interval(np.ones(count)), abs=0.02 if count > 2 else 0.2)
        assert found[0] < 1 == found[1] and found == metrics.percentiles(metrics.resampled_map(perfect, relevant))
    rng = np.random.default_rng(0)
    scores, relevant = rng.random((300, 3)), rng.random((300, 3)) < 0.3
    low, high = metrics.percentiles(metrics.resampled_map(scores, relevant))
    assert low < metrics.mean_average_precision(scores, relevant)[0] < high and high - low < 0.12


def test_intervals_of_weighted_and_coupled_values():
    values, labels = np.arange(200) % 3 == 0, np.arange(200) % 2
    assert metrics.interval(values, weights=metrics.class_weights(labels)) == metrics.interval(values)
    five = np.repeat(values, 5)  # the five captions of a picture agree: they say no more than one
    assert metrics.interval(five, units=np.repeat(np.arange(200), 5)) == pytest.approx(
        metrics.interval(values), abs=1e-9
    )
    assert np.ptp(metrics.interval(five)) < 0.5 * np.ptp(metrics.interval(values))


def test_similarity_is_rounded_once():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(40, 129)).astype(np.float32), rng.normal(size=(50, 129)).astype(np.float32)
    exact = np.float32([[sum(map(fractions.Fraction, map(float, x.astype(float) * y))) for y in b[:4]] for x in a[:4]])
    whole = similarity(a, b)
    assert np.array_equal(whole[:4, :4], exact), "products of two float32 are exact in float64"
    for i, j in ((0, 0), (7, 49), (39, 13)):
        assert np.array_equal(similarity(a[i : i + 1], b[j : j + 3]), whole[i : i + 1, j : j + 3])


def test_a_diverged_model_retrieves_nothing():
    scores = np.full((3, 3), np.nan)
    scores[0] = [0.5, 0.4, 0.3]
    ranks = metrics.retrieval_ranks(lambda i, t: scores[i, t], metrics.Pairs(3, np.arange(3)))
    assert ranks["image_to_text"].above.tolist() == [0, 3, 3]
    assert metrics.recall(ranks, ks=(1,))["text_to_image/recall@1"] == pytest.approx(1 / 3)


def test_fixed_logits_give_what_scikit_learn_gives():
    """Golden numbers of scikit-learn; tests/parity/test_metrics.py makes and compares them live."""
    golden = np.load(GOLDEN / "metrics.npz")
    logits, labels = golden["logits"], golden["labels"]
    for k in (1, 2, 5):
        assert top_k_accuracy(logits, labels, k=k) == pytest.approx(golden[f"top_k_accuracy_score_{k}"], abs=1e-12)
    mean, _ = mean_per_class_accuracy(logits.argmax(1) == labels, labels, logits.shape[1])
    assert mean == pytest.approx(golden["balanced_accuracy_score"], abs=1e-12)
    similarity = golden["similarity"]
    ours = retrieval_recall(similarity, np.arange(len(similarity)), ks=(1, 5, 10))
    for k in (1, 5, 10):
        assert ours[f"image_to_text/recall@{k}"] == pytest.approx(golden[f"image_to_text_{k}"], abs=1e-12)
        assert ours[f"text_to_image/recall@{k}"] == pytest.approx(golden[f"text_to_image_{k}"], abs=1e-12)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"scores \[N, M\] and truth \[N\]; got shapes \(2, 3\), \(3,\)"):
        truth_ranks(np.zeros((2, 3)), np.zeros(3, int))
    with pytest.raises(ValueError, match="a caption for each image"):
        retrieval_recall(np.zeros((3, 2)), np.array([0, 2]))
    with pytest.raises(ValueError, match="at least one example"):
        top_k_accuracy(np.zeros((1, 2)), np.zeros(1, int), np.array([False]))
