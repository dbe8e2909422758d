"""Linear classifiers at their optimum, and the probe on features that are colours."""

import json

import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax

from vlm_jax import evaluators
from vlm_jax.errors import UserError
from vlm_jax.evaluators.sampling import few_shots
from vlm_jax.pretrained.linear import logistic_regression, ridge
from vlm_jax.pretrained.neighbours import knn

X = np.array([[0.0, 1.0], [1.0, 3.0], [2.0, 0.0], [4.0, 1.0], [5.0, 5.0], [3.0, 2.0]])
Y = np.array([0, 0, 1, 2, 2, 1])
# scikit-learn 1.9.1: RidgeClassifier(alpha=0.5) and LogisticRegression(C=2, solver="newton-cholesky", tol=1e-12)
RIDGE = [
    [-0.566523605, 0.137339056, 0.429184549],
    [0.274678112, -0.309012876, 0.034334764],
    [0.533619456, -0.058655222, -1.474964235],
]
LOGISTIC = [
    [-1.264743532, 0.028781093, 1.235962438],
    [0.441638324, -0.370971709, -0.070666615],
    [2.111781385, 1.257063025, -3.368844410],
]


def case(seed, examples, width, classes):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, examples)
    return rng.normal(size=(examples, width)) + np.eye(width)[labels] + 5, labels


@pytest.mark.parametrize(("examples", "width"), [(40, 6), (12, 30)])
def test_ridge_is_at_its_minimum(examples, width):
    """Both forms, of few and of many features: the derivatives by weights and bias vanish."""
    features, labels = case(0, examples, width, 4)
    fitted = ridge(features, labels, 4, l2=0.7)
    rest = fitted(features) - (2 * np.eye(4)[labels] - 1)
    np.testing.assert_allclose(features.T @ rest + 0.7 * fitted.weights, 0, atol=1e-9)
    np.testing.assert_allclose(rest.sum(0), 0, atol=1e-9)


def test_logistic_regression_is_at_its_minimum():
    features, labels = case(1, 60, 6, 4)
    fitted = logistic_regression(features, labels, 4, l2=0.7)
    rest = softmax(fitted(features), axis=1) - np.eye(4)[labels]
    np.testing.assert_allclose(features.T @ rest + 0.7 * fitted.weights, 0, atol=2e-5)
    np.testing.assert_allclose(rest.sum(0), 0, atol=1e-5)
    np.testing.assert_allclose([fitted.weights.sum(1).max(), fitted.bias.sum()], 0, atol=1e-9)


def test_ours_equal_scikit_learns():
    for fit, l2, numbers, atol in ((ridge, 0.5, RIDGE, 1e-9), (logistic_regression, 0.5, LOGISTIC, 1e-5)):
        fitted = fit(X, Y, 3, l2)
        np.testing.assert_allclose(np.vstack([fitted.weights, fitted.bias]), numbers, atol=atol)


def test_a_class_without_examples_is_never_named():
    fitted = logistic_regression(X, Y + (Y > 0), 4, 0.5)
    np.testing.assert_allclose(fitted.weights[:, [0, 2, 3]], np.array(LOGISTIC)[:2], atol=1e-5)
    assert fitted.bias[1] == -np.inf and not fitted.weights[:, 1].any()
    assert ridge(X, Y + (Y > 0), 4, 0.5)(X)[:, 1] == pytest.approx(-1)


def test_neighbours_vote_by_hand():
    known, labels = case(2, 50, 6, 4)
    asked, _ = case(3, 9, 6, 4)
    found = knn(known, labels, 4, neighbours=7)(asked)
    for query, scores in zip(asked, found, strict=True):
        cosine = [sum(query * x) / (sum(query**2) * sum(x**2)) ** 0.5 for x in known]
        votes = [0.0] * 4
        for i in sorted(range(50), key=lambda i: -cosine[i])[:7]:
            votes[labels[i]] += np.exp(cosine[i] / 0.07)
        np.testing.assert_allclose(scores, votes, rtol=1e-6)


def test_few_shots_are_drawn_by_the_seed():
    labels = np.array([2, 0, 2, -1, 2, 0, 2, 1, 2])
    assert few_shots(labels, None, 0).tolist() == [0, 1, 2, 4, 5, 6, 7, 8]
    drawn = [few_shots(labels, 2, seed) for seed in range(20)]
    assert all(np.bincount(labels[places]).tolist() == [2, 1, 2] for places in drawn)
    assert len({tuple(places) for places in drawn}) > 5 and drawn[3].tolist() == few_shots(labels, 2, 3).tolist()


class Colours:
    """A picture's features are its mean colour."""

    preprocess = "resize(4) | to_float"
    tokenizer = None
    pictures = 0

    def image_feature_batch(self, images):
        self.pictures += len(images)
        return images.mean((1, 2))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Red, green and blue in ten shades; the last two shades are for testing, and one test picture is mislabelled."""
    folder = tmp_path_factory.mktemp("shades")
    rows = []
    for i in range(30):
        colour = [0, 0, 0]
        colour[i % 3] = 255 - 10 * (i // 3)
        Image.new("RGB", (8, 8), tuple(colour)).save(folder / f"{i}.png")
        name = ("red", "green", "blue")[(i + (i == 29)) % 3]
        rows.append(json.dumps({"image": f"{i}.png", "name": name, "part": "test" if i >= 24 else "train"}))
    rows.append(json.dumps({"image": "0.png", "name": "grey", "part": "test"}))
    (folder / "pictures.jsonl").write_text("\n".join(rows))
    return f"jsonl:{folder}/pictures.jsonl"


@pytest.fixture
def section(pictures):
    section = {"type": "probe", "uri": pictures, "train_split": None, "label": "name"}
    return section | {"where": {"part": ["test"]}, "train_where": {"part": ["train"]}}


@pytest.mark.parametrize(
    "settings",
    [{}, {"solver": "lbfgs"}, {"shots": 2}, {"classes": ["red", "green", "blue"]}, {"solver": "knn", "neighbours": 3}],
)
def test_colours_are_told_apart(section, settings):
    results = [evaluators.build(section | settings | {"batch_size": size})(Colours()) for size in (5, 64)]
    assert results[0].metrics == results[1].metrics
    metrics = results[0].metrics
    assert metrics["top1"] == pytest.approx(5 / 6) and metrics["mean_per_class"] == pytest.approx((2 / 3 + 1 + 1) / 3)
    assert (metrics["examples"], metrics["left_out"]) == (6, 1) and "top5" not in metrics
    assert metrics["train_examples"] == (6 if "shots" in settings else 24)
    predictions = results[0].artifacts["predictions"]
    names = results[0].artifacts["classes"]
    assert [names[i] for i in predictions["predicted"]] == ["red", "green", "blue"] * 2


def test_only_the_drawn_pictures_are_embedded(section):
    model = Colours()
    evaluators.build(section | {"shots": 1, "batch_size": 1})(model)
    assert model.pictures == 3 + 6, "a batch without a picture of the classes is skipped"


def test_features_of_untrained_models(captioner, two_tower):
    section = {
        "type": "probe", "uri": "tfds:emoji", "split": "unseen_style", "label": "concept", "shots": 2, "batch_size": 16,
        "where": {"subgroup": ["animal-bug"]}, "train_where": {"subgroup": ["animal-bug"]},
    }  # fmt: skip
    for model in (captioner, two_tower):
        metrics = evaluators.build(section)(model).metrics
        assert metrics["top5"] > 1.4 * 5 / 11, "better than chance"
        assert (metrics["train_examples"], metrics["examples"], metrics["left_out"]) == (22, 11, 0)


def test_any_layer_is_probed(section, two_tower):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (40, 40, 3), dtype=np.uint8) for _ in range(2)]
    expected = two_tower.features(pictures, layers=[0])[0].mean(1)
    found = two_tower.image_feature_batch(two_tower._pictures(pictures), layer=0)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - two_tower.image_features(pictures)).max() > 0.1
    with pytest.raises(UserError, match="layers asks for block 9 of"):
        evaluators.build(section | {"layer": 9, "batch_size": 2})(two_tower)
    metrics = evaluators.build(section | {"layer": 0, "batch_size": 2})(two_tower).metrics
    assert (metrics["train_examples"], metrics["examples"]) == (24, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"neighbours": 0}, "neighbours is 0; expected 1 or more"),
        ({"solver": "svm"}, "the solver of a probe is `svm`; expected one of: ridge, lbfgs"),
        ({"shots": 0}, "shots is 0; expected a number of training pictures of each class"),
        ({"l2": 0.0}, "l2 is 0.0; expected a number above 0"),
        ({"classes": ["pink"]}, "no training picture's `name` is among the classes"),
        ({"train_where": {"name": ["grey"]}}, "no picture's `name` is among the classes grey; the labels are red"),
        ({"solver": "lbfgs", "classes": ["red"]}, "all 8 training pictures are of one class"),
    ],
)
def test_mistakes_are_named(section, changes, message):
    if "train_where" in changes:
        section["where"] = {"name": ["red"]}
    with pytest.raises(UserError, match=message):
        evaluators.build(section | changes)(Colours())


def test_wrong_arrays_are_named():
    for fit in (ridge, logistic_regression):
        with pytest.raises(UserError, match=r"features \[N, D\] and labels \[N\], N > 0; got \(6, 2\), \(5,\)"):
            fit(X, Y[1:], 3, 1.0)
        with pytest.raises(UserError, match="labels are 0 to 2; expected 0 to 1, the classes"):
            fit(X, Y, 2, 1.0)
        with pytest.raises(UserError, match="not finite"):
            fit(X * np.nan, Y, 3, 1.0)
