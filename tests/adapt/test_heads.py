"""Few-shot heads against loops written from the papers, and their limits."""

import functools
import math

import numpy as np
import pytest

from vlm_jax.adapt import heads
from vlm_jax.adapt.heads.training import shuffled
from vlm_jax.errors import UserError

C, D, E, SCALE = 5, 16, 24, 20.0


def normalised(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def case(shots, seed=0):
    """Unit-norm features and labels of Gaussian classes, and a text embedding of each, float32 numbers."""
    centres = np.random.default_rng(100).normal(size=(C, D))
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(C), shots))
    features = normalised(centres[labels] + 1.2 * rng.normal(size=(len(labels), D)) + 0.5)
    text = normalised(centres + 1.5 * np.random.default_rng(101).normal(size=(C, D)))
    return features.astype(np.float32), labels, text.astype(np.float32)


X, Y, TEXT = case(shots=6)
QUERIES, TRUTH, _ = case(shots=8, seed=1)
ZERO_SHOT = SCALE * QUERIES.astype(np.float64) @ TEXT.T.astype(np.float64)
KERNEL = np.random.default_rng(7).normal(size=(E, D)).astype(np.float32) / 4
BIAS = np.random.default_rng(8).normal(size=D).astype(np.float32) / 4
BEFORE = (X @ np.linalg.pinv(KERNEL) + np.random.default_rng(9).normal(size=(len(X), E)) / 4).astype(np.float32)
VIEWS = np.stack([BEFORE, BEFORE[:, ::-1]])  # one shape of arguments throughout: one compilation


def softmax(x):
    weights = [math.exp(value - max(x)) for value in x]
    return np.array([weight / sum(weights) for weight in weights])


def cross_entropy(logits, labels):
    return np.mean([-math.log(softmax(row)[label]) for row, label in zip(logits, labels, strict=True)])


def test_zero_shot_is_scaled_cosines():
    np.testing.assert_allclose(heads.zero_shot(TEXT, SCALE)(QUERIES), ZERO_SHOT, rtol=1e-12)


UNEVEN = X[4:].astype(np.float64), Y[4:]  # classes of different sizes


def gaussian_by_loops(x, labels):
    """The paper's estimator with numpy.linalg.inv."""
    means = [np.mean([row for row, label in zip(x, labels, strict=True) if label == k], axis=0) for k in range(C)]
    covariance = sum(np.outer(row - means[k], row - means[k]) for row, k in zip(x, labels, strict=True)) / (len(x) - 1)
    precision = D * np.linalg.inv((len(x) - 1) * covariance + np.trace(covariance) * np.eye(D))
    return lambda query: [m @ precision @ query + math.log(1 / C) - m @ precision @ m / 2 for m in means]


def test_gda_is_the_papers():
    logits = gaussian_by_loops(*UNEVEN)
    expected = ZERO_SHOT + 0.3 * np.array([logits(query) for query in QUERIES.astype(np.float64)])
    np.testing.assert_allclose(heads.gda(*UNEVEN, TEXT, SCALE, alpha=0.3)(QUERIES), expected, rtol=1e-6)


@pytest.mark.parametrize("shrinkage", [0.2, 1.0])
def test_a_gaussian_with_shrinkage_is_bayes_rule_of_normal_densities(shrinkage):
    x, labels = UNEVEN
    means = np.stack([x[labels == k].mean(0) for k in range(C)])
    covariance = np.cov((x - means[labels]).T, bias=True)
    covariance = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / D * np.eye(D)
    share = np.bincount(labels) / len(labels)
    distance = lambda q, k: (q - means[k]) @ np.linalg.inv(covariance) @ (q - means[k])
    log_joint = np.array([[math.log(share[k]) - distance(q, k) / 2 for k in range(C)] for q in QUERIES])
    head = heads.gaussian(x, labels, C, shrinkage=shrinkage, prior="frequency")
    ours = np.array([softmax(row) for row in head(QUERIES)])
    np.testing.assert_allclose(ours, [softmax(row) for row in log_joint], rtol=1e-6)


def tip_by_loops(keys, labels, queries, alpha, beta):
    logits = SCALE * queries @ TEXT.T.astype(np.float64)
    for i, query in enumerate(queries):
        for key, label in zip(keys, labels, strict=True):
            logits[i, label] += alpha * math.exp(-beta * (1 - query @ key))
    return logits


TIP = dict(alpha=1.5, beta=5.5)
TIP_LOGITS = tip_by_loops(X.astype(np.float64), Y, QUERIES.astype(np.float64), **TIP)


def test_tip_adapter_is_the_papers():
    np.testing.assert_allclose(heads.tip_adapter(X, Y, TEXT, SCALE, **TIP)(QUERIES), TIP_LOGITS, rtol=1e-5, atol=1e-5)


def tip_x_by_loops(queries, gamma, temperature, reference):
    signatures = lambda rows: [softmax(row @ TEXT.T.astype(np.float64) / temperature) for row in rows]
    kl = lambda p, q: sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    table = lambda rows: np.array([[kl(s, t) for t in signatures(X.astype(np.float64))] for s in signatures(rows)])
    source, target = table(reference), reference @ X.T.astype(np.float64)
    logits = tip_by_loops(X.astype(np.float64), Y, queries, **TIP)
    for i, row in enumerate(table(queries)):
        for value, label in zip(row, Y, strict=True):
            share = (value - source.min()) / (source.max() - source.min())
            logits[i, label] -= gamma * (target.min() + share * (target.max() - target.min()))
    return logits


@pytest.mark.parametrize("reference", [None, case(shots=4, seed=2)[0]])
def test_tip_x_is_the_papers(reference):
    queries = QUERIES.astype(np.float64)
    expected = tip_x_by_loops(queries, 0.7, 0.5, queries if reference is None else reference.astype(np.float64))
    head = heads.tip_x(X, Y, TEXT, SCALE, **TIP, gamma=0.7, reference=reference)
    np.testing.assert_allclose(head(QUERIES), expected, rtol=1e-5, atol=1e-5)


def test_with_a_reference_tip_x_names_each_picture_by_itself():
    head = heads.tip_x(X, Y, TEXT, SCALE, **TIP, gamma=3.0, reference=X)
    np.testing.assert_allclose(head(QUERIES)[:1], head(QUERIES[:1]), rtol=1e-5)


def test_sus_x_is_tip_x_on_what_the_names_find():
    """Exactly; no label is read. Without weights it is Tip-Adapter on these supports, and zero-shot."""
    wanted = [sorted(range(len(X)), key=lambda i, name=name: -float(X[i] @ name))[:3] for name in np.float64(TEXT)]
    rows, labels = np.concatenate(wanted), np.repeat(np.arange(C), 3)
    found = heads.sus_x(TEXT, SCALE, X, supports=3, **TIP, gamma=0.7)
    np.testing.assert_array_equal(found.tip.keys, X[rows])
    given = X[rows], labels, TEXT, SCALE
    np.testing.assert_array_equal(found(QUERIES), heads.tip_x(*given, **TIP, gamma=0.7)(QUERIES))
    plain = heads.sus_x(TEXT, SCALE, X, supports=3, **TIP)
    np.testing.assert_array_equal(plain(QUERIES), heads.tip_adapter(*given, **TIP)(QUERIES))
    none = heads.sus_x(TEXT, SCALE, X, supports=3, alpha=0.0)
    np.testing.assert_array_equal(none(QUERIES), heads.zero_shot(TEXT, SCALE)(QUERIES))
    assert len(heads.sus_x(TEXT, SCALE, X, supports=99).tip.keys) == C * len(X)


def test_what_has_no_weight_changes_nothing():
    zero_shot = heads.zero_shot(TEXT, SCALE)(QUERIES)
    tip = heads.tip_adapter(X, Y, TEXT, SCALE, **TIP)
    np.testing.assert_array_equal(heads.gda(X, Y, TEXT, SCALE, alpha=0.0)(QUERIES), zero_shot)
    np.testing.assert_array_equal(tip._replace(alpha=0.0)(QUERIES), zero_shot)
    np.testing.assert_array_equal(heads.tip_x(X, Y, TEXT, SCALE, **TIP, gamma=0.0)(QUERIES), tip(QUERIES))


def test_untrained_heads_are_where_training_begins():
    zero_shot = heads.zero_shot(TEXT, SCALE)
    tip, trained = heads.tip_adapter(X, Y, TEXT, SCALE, **TIP), heads.tip_adapter_f(X, Y, TEXT, SCALE, **TIP, epochs=0)
    np.testing.assert_array_equal(trained(QUERIES), tip(QUERIES))
    np.testing.assert_array_equal(heads.cross_modal_probe(X, Y, TEXT, SCALE, steps=0)(QUERIES), zero_shot(QUERIES))
    projected = normalised(BEFORE.astype(np.float64) @ KERNEL + BIAS)
    head = heads.train_projection(BEFORE, Y, TEXT, SCALE, KERNEL, BIAS, steps=0)
    np.testing.assert_array_equal(head(BEFORE), zero_shot(projected))


def adam_by_loops(gradient, start, batches, rates, weight_decay, eps):
    """AdamW as torch writes it: decay first, then the step."""
    x, m, v = np.array(start, np.float64), 0.0, 0.0
    for t, (batch, rate) in enumerate(zip(batches, rates, strict=True), 1):
        g = gradient(x, batch)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        x = x * (1 - rate * weight_decay) - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + eps)
    return x


def cosine(rate, steps):
    return [rate * (1 + math.cos(math.pi * t / steps)) / 2 for t in range(steps)]


def residual(logits, labels):
    """The derivative of the mean cross-entropy by logits."""
    return (np.array([softmax(row) for row in logits]) - np.eye(C)[labels]) / len(labels)


def test_tip_adapter_f_trains_keys_as_torch_would():
    x, values, epochs, rate = X.astype(np.float64), np.eye(C)[Y], 3, 3e-2

    def gradient(keys, rows):
        rows = rows[rows >= 0]  # the last batch of an epoch is short
        affinity = np.exp(-5.5 * (1 - x[rows] @ keys.T))
        logits = 1.5 * affinity @ values + SCALE * x[rows] @ TEXT.T
        return (1.5 * 5.5 * affinity * (residual(logits, Y[rows]) @ values.T)).T @ x[rows]

    batches = shuffled(len(X), 8, epochs, 0)
    assert batches.shape == (12, 8) and all(sorted(b[b >= 0]) == list(range(30)) for b in batches.reshape(3, 32))
    expected = adam_by_loops(gradient, x, batches, cosine(rate, 12), 0.01, 1e-4)
    head = heads.tip_adapter_f(X, Y, TEXT, SCALE, **TIP, epochs=epochs, batch_size=8, learning_rate=rate)
    np.testing.assert_allclose(head.keys, expected, rtol=1e-5, atol=1e-5)
    before = heads.tip_adapter(X, Y, TEXT, SCALE, **TIP)
    assert cross_entropy(head(X), Y) < cross_entropy(before(X), Y) - 0.05


def test_cross_modal_probes_train_on_halves_of_pictures_and_texts_as_torch_would():
    x, labels, steps = np.concatenate([X, TEXT]).astype(np.float64), np.append(Y, np.arange(C)), 120
    halves = shuffled(30, 4, 18, (0, 0)), shuffled(5, 4, steps, (0, 1))
    pictures, texts = (half[(half >= 0).all(1)][:steps] for half in halves)  # no short ones
    batches = np.concatenate([pictures, texts + 30], axis=1)
    assert batches.shape == (steps, 8)
    gradient = lambda w, rows: SCALE * residual(SCALE * x[rows] @ w.T, labels[rows]).T @ x[rows]
    rates = [1e-5] + [3e-3 * i / 50 for i in range(1, 50)] + cosine(3e-3, steps)[: steps - 50]
    expected = adam_by_loops(gradient, TEXT, batches, rates, 0.01, 1e-8)
    head = heads.cross_modal_probe(X, Y, TEXT, SCALE, steps=steps, batch_size=8, learning_rate=3e-3)
    np.testing.assert_allclose(head.weights.T / SCALE, expected, rtol=1e-4, atol=1e-5)
    both = lambda head: cross_entropy(head(x), labels)
    assert both(head) < both(heads.zero_shot(TEXT, SCALE)) - 0.05


@pytest.mark.parametrize(("pull", "weight"), [("1/N", 1 / 6), ("1/N^2", 1 / 36), (0.0, 0.0)])
def test_prolip_trains_the_projection_as_torch_would(pull, weight):
    def gradient(kernel, view):
        x = VIEWS[view].astype(np.float64)
        z = x @ kernel + BIAS
        norm = np.linalg.norm(z, axis=1, keepdims=True)
        unit = z / norm
        by_unit = SCALE * residual(SCALE * unit @ TEXT.T, Y) @ TEXT
        by_z = (by_unit - unit * np.sum(by_unit * unit, axis=1, keepdims=True)) / norm
        return x.T @ by_z + 2 * weight * (kernel - KERNEL)

    expected = adam_by_loops(gradient, KERNEL, [0, 1] * 15, cosine(1e-2, 30), 0.0, 1e-4)
    head = heads.train_projection(VIEWS, Y, TEXT, SCALE, KERNEL, BIAS, pull=pull, steps=30, learning_rate=1e-2)
    np.testing.assert_allclose(head.kernel, expected, rtol=1e-4, atol=1e-5)


def test_prolip_learns_unless_it_is_pulled_back():
    train = functools.partial(heads.train_projection, VIEWS, Y, TEXT, SCALE, KERNEL, learning_rate=3e-3)
    start, free, held = train(steps=0), train(pull=0.0, steps=30), train(pull=1e6, steps=30)
    assert cross_entropy(free(BEFORE), Y) < cross_entropy(start(BEFORE), Y) - 0.05
    moved = lambda head: np.abs(head.kernel - KERNEL).max()
    assert moved(free) > 0.02
    assert moved(held) < 3e-3, "a step of Adam"


def test_a_linear_probe_is_logistic_regression():
    head = heads.linear_probe(X, Y, TEXT, SCALE, l2=0.1)
    gradient = residual(head(X), Y).T @ X * len(Y) + 0.1 * head.weights.T
    np.testing.assert_allclose(gradient, 0, atol=1e-5)


def test_choose_takes_the_first_of_the_best_on_what_it_is_given():
    built = []

    def build(**parameters):
        built.append(parameters)
        return lambda features: np.eye(2)[(features[:, 0] > parameters["at"]).astype(int)] + parameters["shift"]

    features, labels = np.arange(10.0)[:, None], (np.arange(10) > 6).astype(int)
    choice = heads.choose(build, {"at": [2, 6, 6.5], "shift": [0, 1]}, features, labels)
    assert (choice.parameters, choice.accuracy) == ({"at": 6, "shift": 0}, 1.0)
    assert len(built) == 6 and choice.head(features).argmax(1).tolist() == labels.tolist()


def test_heads_are_chosen_on_validation():
    grid = {"alpha": [0.0, 0.5, 2.0], "beta": [1.0, 5.0]}
    accuracy = lambda head: np.mean(head(QUERIES).argmax(1) == TRUTH)
    tip = functools.partial(heads.tip_adapter, X, Y, TEXT, SCALE)
    every = [accuracy(tip(alpha=alpha, beta=beta)) for alpha in grid["alpha"] for beta in grid["beta"]]
    for build in (tip, tip(alpha=9.0, beta=9.0)._replace):
        choice = heads.choose(build, grid, QUERIES, TRUTH)
        assert choice.accuracy == max(every) == accuracy(choice.head) > accuracy(heads.zero_shot(TEXT, SCALE))
        assert (choice.head.alpha, choice.head.beta) == tuple(choice.parameters.values())


def refused(message, call, *arguments, **options):
    with pytest.raises(UserError, match=message):
        call(*arguments, **options)


@pytest.mark.parametrize(
    "build",
    [
        functools.partial(heads.gda, alpha=1.0),
        functools.partial(heads.tip_adapter, **TIP),
        functools.partial(heads.tip_adapter_f, **TIP),
        functools.partial(heads.tip_x, **TIP, gamma=1.0),
        heads.cross_modal_probe,
    ],
)
def test_what_does_not_fit_is_refused(build):
    refused("training features have shape", build, X[:, :-1], Y, TEXT, SCALE)
    refused("training features have norms", build, 2 * X, Y, TEXT, SCALE)
    refused("text embeddings have norms", build, X, Y, TEXT * np.nan, SCALE)
    refused("30 pictures", build, X, Y[:-1], TEXT, SCALE)
    refused("labels are float64", build, X, Y.astype(float), TEXT, SCALE)
    refused("expected 0 to 3", build, X, Y, TEXT[:-1], SCALE)


def test_other_refusals():
    refused("class 2 has no", heads.gaussian, X[Y != 2], Y[Y != 2], C)
    refused("no covariance", heads.gaussian, TEXT, np.arange(C), C)
    refused("no inverse", heads.gaussian, X[:10], np.arange(10) % C, C, shrinkage=0.0)
    refused("shrinkage is 2", heads.gaussian, X, Y, C, shrinkage=2.0)
    refused("prior", heads.gaussian, X, Y, C, prior="flat")
    refused("temperature", heads.tip_x, X, Y, TEXT, SCALE, **TIP, gamma=1.0, temperature=0.0)
    refused("reference features", heads.tip_x, X, Y, TEXT, SCALE, **TIP, gamma=1.0, reference=X[:, 1:])
    refused("supports of sus_x is 0", heads.sus_x, TEXT, SCALE, X, supports=0)
    refused("features of the pool have shape", heads.sus_x, TEXT, SCALE, X[:, 1:])
    refused("batch_size is 0", heads.tip_adapter_f, X, Y, TEXT, SCALE, **TIP, batch_size=0)
    refused("even", heads.cross_modal_probe, X, Y, TEXT, SCALE, batch_size=7)
    refused("do not fit", heads.train_projection, BEFORE, Y, TEXT, SCALE, KERNEL.T)
    refused("30 pictures", heads.train_projection, BEFORE, Y[1:], TEXT, SCALE, KERNEL)
    refused("1/N", heads.train_projection, BEFORE, Y, TEXT, SCALE, KERNEL, pull="1/n")
    refused("diverged", heads.train_projection, VIEWS, Y, TEXT, SCALE, KERNEL, learning_rate=math.inf, steps=30)
    refused("nothing to choose", heads.choose, heads.tip_adapter, {"alpha": []}, X, Y)
    refused("labels are", heads.choose, lambda: heads.zero_shot(TEXT, SCALE), {}, X, Y[1:])


def test_concept_embeddings_train_on_pictures_alone_as_torch_would():
    x, steps = X.astype(np.float64), 60
    batches = shuffled(30, 8, 15, 0)[:steps]  # the last batch of an epoch is short
    gradient = lambda v, rows: (
        SCALE * residual(SCALE * x[rows[rows >= 0]] @ v.T, Y[rows[rows >= 0]]).T @ x[rows[rows >= 0]]
    )
    rates = [1e-5] + [3e-3 * i / 50 for i in range(1, 50)] + cosine(3e-3, steps)[: steps - 50]
    expected = adam_by_loops(gradient, TEXT, batches, rates, 0.0, 1e-8)
    head = heads.concept_embeddings(X, Y, TEXT, SCALE, steps=steps, batch_size=8, learning_rate=3e-3)
    np.testing.assert_allclose(head.weights.T / SCALE, expected, rtol=1e-4, atol=1e-5)
    untrained = heads.concept_embeddings(X, Y, TEXT, SCALE, steps=0)
    np.testing.assert_array_equal(untrained(QUERIES), heads.zero_shot(TEXT, SCALE)(QUERIES))
