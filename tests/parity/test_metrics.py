"""Metrics against scikit-learn, live. `python -m tests.parity.test_metrics` writes tests/golden/metrics.npz."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from tests.support.paths import GOLDEN
from vlm_jax.evaluators.metrics import mean_per_class_accuracy, retrieval_recall, top_k_accuracy


def fixed_case(seed: int = 0) -> dict[str, np.ndarray]:
    """Logits [300, 12] that lean to the label, class 7 without examples; similarities of 60 images and 60 texts."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(np.delete(np.arange(12), 7), 300, p=np.arange(1, 12) / 66)
    logits = rng.normal(size=(300, 12)) + 1.2 * np.eye(12)[labels]
    similarity = rng.normal(size=(60, 60)) + 1.5 * np.eye(60)
    return {"logits": logits.astype(np.float32), "labels": labels, "similarity": similarity.astype(np.float32)}


def theirs(case: dict[str, np.ndarray]) -> dict[str, float]:
    logits, labels, similarity = case["logits"], case["labels"], case["similarity"]
    own = np.arange(len(similarity))
    top_k = {
        f"top_k_accuracy_score_{k}": top_k_accuracy_score(labels, logits, k=k, labels=range(12)) for k in (1, 2, 5)
    }
    recall = {f"image_to_text_{k}": top_k_accuracy_score(own, similarity, k=k) for k in (1, 5, 10)}
    recall |= {f"text_to_image_{k}": top_k_accuracy_score(own, similarity.T, k=k) for k in (1, 5, 10)}
    # scikit-learn leaves classes without examples out of the mean, with a warning
    balanced = balanced_accuracy_score(labels, logits.argmax(1))
    return top_k | recall | {"balanced_accuracy_score": balanced}


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize("seed", range(5))
def test_ours_equal_scikit_learns(seed):
    case = fixed_case(seed)
    expected = theirs(case)
    for k in (1, 2, 5):
        ours = top_k_accuracy(case["logits"], case["labels"], k=k)
        assert ours == pytest.approx(expected[f"top_k_accuracy_score_{k}"], abs=1e-12)
    mean, per_class = mean_per_class_accuracy(case["logits"].argmax(1) == case["labels"], case["labels"], 12)
    assert mean == pytest.approx(expected["balanced_accuracy_score"], abs=1e-12)
    assert np.isnan(per_class[7])
    ours = retrieval_recall(case["similarity"], np.arange(60), ks=(1, 5, 10))
    for name, value in ours.items():
        assert value == pytest.approx(expected[name.replace("/recall@", "_")], abs=1e-12)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_the_golden_numbers_are_these():
    golden = np.load(GOLDEN / "metrics.npz")
    for name, value in (fixed_case() | theirs(fixed_case())).items():
        np.testing.assert_array_equal(golden[name], value)


if __name__ == "__main__":
    np.savez_compressed(GOLDEN / "metrics.npz", **fixed_case(), **theirs(fixed_case()))
