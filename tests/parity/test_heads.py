"""Few-shot heads against scikit-learn and torch, live."""

import numpy as np
import pytest
import scipy.special
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from vlm_jax.adapt import heads
from vlm_jax.adapt.heads.training import shuffled

CASES = [(200, 16, 5, 0.1), (60, 40, 4, 0.5), (300, 8, 3, 0.0), (90, 24, 6, 1.0)]


def case(examples, width, classes):
    """Unit-norm features and labels of Gaussian classes of different sizes, and other features."""
    rng = np.random.default_rng(examples)
    labels = rng.choice(classes, examples, p=np.arange(1, classes + 1) / (classes * (classes + 1) / 2))
    centres, spread = rng.normal(size=(classes, width)), rng.uniform(0.5, 2, width)
    draw = lambda labels: centres[labels] + spread * rng.normal(size=(len(labels), width))
    normalised = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    return normalised(draw(labels)), labels, normalised(draw(rng.integers(classes, size=500))), normalised(centres)


@pytest.mark.parametrize(("examples", "width", "classes", "shrinkage"), CASES)
def test_gaussians_equal_theirs(examples, width, classes, shrinkage):
    features, labels, queries, _ = case(examples, width, classes)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage or None).fit(features, labels)
    ours = heads.gaussian(features, labels, classes, shrinkage=shrinkage, prior="frequency")
    np.testing.assert_allclose(ours.weights.T, theirs.coef_, rtol=1e-6)
    np.testing.assert_allclose(ours(queries), theirs.decision_function(queries), rtol=1e-6)
    np.testing.assert_allclose(scipy.special.softmax(ours(queries), axis=1), theirs.predict_proba(queries), rtol=1e-6)


def test_of_two_classes_theirs_is_the_difference():
    features, labels, queries, _ = case(100, 12, 2)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.3).fit(features, labels)
    logits = heads.gaussian(features, labels, 2, shrinkage=0.3, prior="frequency")(queries)
    np.testing.assert_allclose(logits[:, 1] - logits[:, 0], theirs.decision_function(queries), rtol=1e-6)


def test_the_papers_estimate_is_theirs_up_to_a_factor():
    """D (S + t / (N - 1) I)^-1, S being the scatter, t its trace, is a shrinkage of D / (N - 1 + D)."""
    features, labels, _, _ = case(200, 16, 5)
    shrinkage = 16 / (199 + 16)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(features, labels)
    ours = heads.gaussian(features, labels, 5)
    np.testing.assert_allclose(ours.weights.T, theirs.coef_ * 16 * (1 - shrinkage) / 200, rtol=1e-6)


def trained(parameter, loss, batches, optimizer):
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    for batch in batches:
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()
        schedule.step()
    return parameter.detach().numpy()


def test_tip_adapter_f_is_what_torch_trains():
    features, labels, _, text = case(100, 16, 5)
    batches = [torch.tensor(rows[rows >= 0]) for rows in shuffled(100, 32, 5, 0)]
    x, y, w = torch.tensor(features), torch.tensor(labels), torch.tensor(text)
    keys, values = torch.nn.Parameter(x.clone()), torch.nn.functional.one_hot(y).double()

    def loss(rows):
        logits = 2.0 * torch.exp(-5.5 * (1 - x[rows] @ keys.T)) @ values + 20 * x[rows] @ w.T
        return torch.nn.functional.cross_entropy(logits, y[rows])

    expected = trained(keys, loss, batches, torch.optim.AdamW([keys], lr=1e-2, eps=1e-4))
    options = dict(alpha=2.0, beta=5.5, epochs=5, batch_size=32, learning_rate=1e-2)
    head = heads.tip_adapter_f(features, labels, text, 20.0, **options)
    assert np.abs(expected - features).max() > 0.05
    np.testing.assert_allclose(head.keys, expected, rtol=1e-5, atol=1e-5)


def test_prolip_is_what_torch_trains():
    _, labels, _, text = case(100, 16, 5)
    before = np.random.default_rng(0).normal(size=(100, 24)).astype(np.float32)
    start = np.random.default_rng(1).normal(size=(24, 16)).astype(np.float32) / 4
    x, y, w = torch.tensor(before).double(), torch.tensor(labels), torch.tensor(text)
    kernel = torch.nn.Parameter(torch.tensor(start).double())

    def loss(_):
        z = torch.nn.functional.normalize(x @ kernel, dim=-1)
        pull = torch.nn.MSELoss(reduction="sum")(kernel, torch.tensor(start).double()) / 20  # shots of a class
        return torch.nn.functional.cross_entropy(20 * z @ w.T, y) + pull

    expected = trained(kernel, loss, range(50), torch.optim.Adam([kernel], lr=1e-2, eps=1e-4))
    head = heads.train_projection(before, labels, text, 20.0, start, steps=50, learning_rate=1e-2)
    assert np.abs(expected - start).max() > 0.05
    np.testing.assert_allclose(head.kernel, expected, rtol=1e-4, atol=1e-5)
