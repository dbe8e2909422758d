"""Metrics against hand-computed numbers, brute force and the golden retrieval recalls."""

import pathlib

import numpy as np
import pytest

from vlm_jax.evaluators import mean_per_class_accuracy, metrics, retrieval_recall, top_k_accuracy, truth_ranks

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


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"scores \[N, M\] and truth \[N\]; got shapes \(2, 3\), \(3,\)"):
        truth_ranks(np.zeros((2, 3)), np.zeros(3, int))
    with pytest.raises(ValueError, match="a caption for each image"):
        retrieval_recall(np.zeros((3, 2)), np.array([0, 2]))
    with pytest.raises(ValueError, match="at least one example"):
        top_k_accuracy(np.zeros((1, 2)), np.zeros(1, int), np.array([False]))
