"""Linear probes against scikit-learn, live."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, RidgeClassifier

from vlm_jax.pretrained.linear import logistic_regression, ridge

CASES = [(200, 10, 5, 1.0), (30, 50, 4, 0.1), (400, 20, 3, 1e-2), (300, 16, 8, 30.0)]


def case(examples, width, classes):
    rng = np.random.default_rng(examples)
    labels = rng.choice(classes, examples, p=np.arange(1, classes + 1) / (classes * (classes + 1) / 2))
    features = rng.normal(size=(examples, width)) * rng.uniform(0.2, 3, width) + 2 * rng.normal(size=width)
    features[:, :classes] += np.eye(classes)[labels]
    return features, labels, features.mean(0) + 3 * rng.normal(size=(1000, width))


@pytest.mark.parametrize(("examples", "width", "classes", "l2"), CASES)
def test_ridge_equals_theirs(examples, width, classes, l2):
    features, labels, queries = case(examples, width, classes)
    ours, theirs = ridge(features, labels, classes, l2), RidgeClassifier(alpha=l2).fit(features, labels)
    np.testing.assert_allclose(ours.weights.T, theirs.coef_, atol=1e-10)
    np.testing.assert_allclose(ours.bias, theirs.intercept_, atol=1e-10)
    np.testing.assert_array_equal(ours(queries).argmax(1), theirs.predict(queries))


@pytest.mark.parametrize(("examples", "width", "classes", "l2"), CASES)
def test_logistic_regression_equals_theirs(examples, width, classes, l2):
    features, labels, queries = case(examples, width, classes)
    theirs = LogisticRegression(C=1 / l2, solver="newton-cholesky", tol=1e-12, max_iter=1000).fit(features, labels)
    ours = logistic_regression(features, labels, classes, l2)
    np.testing.assert_allclose(ours.weights.T, theirs.coef_, atol=1e-4)
    np.testing.assert_allclose(ours.bias, theirs.intercept_, atol=1e-4)
    np.testing.assert_array_equal(ours(queries).argmax(1), theirs.predict(queries))


def test_of_two_classes_theirs_is_ours_at_twice_the_l2():
    features, labels, queries = case(120, 6, 2)
    theirs = LogisticRegression(C=1.0, tol=1e-12, max_iter=1000).fit(features, labels)
    ours = logistic_regression(features, labels, 2, l2=2.0)
    np.testing.assert_allclose(ours.weights[:, 1] - ours.weights[:, 0], theirs.coef_[0], atol=1e-4)
    np.testing.assert_array_equal(ours(queries).argmax(1), theirs.predict(queries))
