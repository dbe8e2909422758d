"""Metrics against hand-computed numbers, brute force and the golden retrieval recalls."""

import fractions
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
    assert truth_ranks(logits, labels).tolist() == [0, 2, 1, 0]
    assert [top_k_accuracy(logits, labels, k=k) for k in (1, 2, 3)] == [0.5, 0.75, 1.0]
    mask = np.array([True, True, True, False])
    assert top_k_accuracy(logits, np.array([1, 2, 1, -7]), mask) == 1 / 3, "a masked label may be anything"


def test_ranks_equal_a_stable_sort():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, (3000, 7)).astype(np.float32)  # many ties, more rows than fit one chunk
    truth = rng.integers(0, 7, 3000)
    order = np.argsort(-scores, axis=1, kind="stable")
    assert np.array_equal(truth_ranks(scores, truth), (order == truth[:, None]).argmax(axis=1))


def test_a_diverged_model_gets_nothing_right():
    assert top_k_accuracy(np.full((2, 3), np.nan), np.array([0, 1]), k=3) == 0.0


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


def test_retrieval_matches_brute_force_with_uneven_captions():
    rng = np.random.default_rng(1)
    image_of_text = np.sort(np.concatenate([np.arange(9), rng.integers(0, 9, 14)]))
    similarity = rng.integers(0, 6, (9, 23)).astype(np.float64)
    recall = retrieval_recall(similarity, image_of_text, ks=(1, 3))
    for k in (1, 3):
        texts = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
        images = np.argsort(-similarity.T, axis=1, kind="stable")[:, :k]
        by_image = np.mean([any(image_of_text[t] == i for t in row) for i, row in enumerate(texts)])
        by_text = np.mean([image_of_text[t] in row for t, row in enumerate(images)])
        assert recall[f"image_to_text/recall@{k}"] == by_image
        assert recall[f"text_to_image/recall@{k}"] == by_text


def test_blocks_change_nothing(monkeypatch):
    rng = np.random.default_rng(2)
    images, texts = rng.integers(-2, 3, (9, 4)), rng.integers(-2, 3, (23, 4))  # many equal similarities
    image_of_text = rng.permutation(np.concatenate([np.arange(9), rng.integers(0, 9, 14)]))
    matrix = similarity(images.astype(np.float32), texts.astype(np.float32))
    whole = metrics.retrieval_ranks(lambda i, t: matrix[i, t], 9, image_of_text)
    order = np.argsort(-matrix.T, axis=1, kind="stable")
    assert np.array_equal(whole["text_to_image"], (order == image_of_text[:, None]).argmax(1))
    order = np.argsort(-matrix, axis=1, kind="stable")
    assert np.array_equal(whole["image_to_text"], (image_of_text[order] == np.arange(9)[:, None]).argmax(1))
    asked = []

    def scores(i, t):
        asked.append((i.stop - i.start, t.stop - t.start))
        return similarity(images[i].astype(np.float32), texts[t].astype(np.float32))

    monkeypatch.setattr(metrics.ranking, "ROWS", 4)
    monkeypatch.setattr(metrics.ranking, "COLUMNS", 5)
    blockwise = metrics.retrieval_ranks(scores, 9, image_of_text)
    assert all(np.array_equal(whole[name], blockwise[name]) for name in whole)
    index, best = metrics.top_k(scores, 9, 23, 7)
    assert np.array_equal(index, order[:, :7])
    assert np.array_equal(best, np.take_along_axis(matrix, order, 1)[:, :7])
    assert max(asked) <= (4, 5), "never the whole matrix"
    assert metrics.top_k(scores, 9, 3, 7)[0].shape == (9, 3), "fewer candidates than k"


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
    ranks = metrics.retrieval_ranks(lambda i, t: scores[i, t], 3, np.arange(3))
    assert ranks["image_to_text"].tolist() == [0, 3, 3]
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
