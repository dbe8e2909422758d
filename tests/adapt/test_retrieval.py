"""RECO against loops written from its equations, and on concepts that a search among their pairs can name."""

import functools

import jax
import numpy as np
import pytest

from vlm_jax.adapt import heads, retrieval
from vlm_jax.adapt.heads.training import shuffled
from vlm_jax.adapt.retrieval import alignment, reco, retrieve
from vlm_jax.errors import UserError

D, HEADS, CONCEPTS, EACH, K, SCALE = 12, 2, 40, 4, 3, 10.0
SMALL = dict(k=K, heads=HEADS, mlp_dim=16, batch_size=64)


def normalised(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def case(concepts):
    """Pairs of concepts whose pictures and texts have nothing in common: only other pairs say what goes with what."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(concepts), EACH)
    centres = rng.normal(size=(2, concepts, D))
    noisy = normalised(centres[:, labels] + 0.3 * rng.normal(size=(2, len(labels), D)))
    return *noisy.astype(np.float32), labels


IMAGES, TEXTS, LABELS = case(CONCEPTS)
N, M = len(LABELS), 80  # few shapes: few compilations


@functools.cache
def untrained(**options):
    return reco(IMAGES, TEXTS, SCALE, steps=0, **SMALL | options)


def randomised(head):
    """The head with parameters that leave nothing at 0 or 1."""
    rng = np.random.default_rng(5)
    draw = lambda leaf: (0.5 * rng.normal(size=leaf.shape)).astype(np.float32)
    return head._replace(params=jax.tree.map(draw, head.params))


def found_by_loops(query, memory, k, own=-1):
    order = sorted(range(len(memory)), key=lambda i: (-np.float32(memory[i].astype(np.float64) @ query), i))
    return [i for i in order if i != own][:k]


def layer_by_loops(params, x, found):
    """norm, attention and MLP of one embedding and what was found for it, in float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["blocks_0"])
    tokens = np.stack([x, *found]).astype(np.float64)

    def norm(z, p):
        z = z - z.mean(-1, keepdims=True)
        return z / np.sqrt(np.mean(z**2, -1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]

    dense = lambda z, p: z @ p["kernel"] + p["bias"]
    h = norm(tokens, p["norm1"])
    query, key, value = (dense(h, p["attn"][name]) for name in ("query", "key", "value"))
    of_heads = []
    for head in np.split(np.arange(D), HEADS):
        weights = np.exp(query[:1, head] @ key[:, head].T / np.sqrt(D / HEADS))
        of_heads.append(weights / weights.sum() @ value[:, head])
    y = tokens[:1] + p["layer_scale1"] * dense(np.concatenate(of_heads, axis=1), p["attn"]["out"])
    h = dense(norm(y, p["norm2"]), p["mlp"]["fc1"])
    h = h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    return normalised(y + p["layer_scale2"] * dense(h, p["mlp"]["fc2"]))[0]


@pytest.mark.parametrize("own", [False, True])
def test_retrieve_finds_the_nearest_but_itself(own):
    exclude = np.arange(N) if own else None
    found = retrieve(IMAGES, IMAGES, 5, exclude)
    expected = [found_by_loops(x, IMAGES, 5, i if own else -1) for i, x in enumerate(IMAGES)]
    np.testing.assert_array_equal(found, expected)
    assert (found[:, 0] == np.arange(N)).all() != own


def test_equals_are_found_in_order_and_what_is_excluded_never():
    memory = np.concatenate([TEXTS[:2]] * 3)
    np.testing.assert_array_equal(retrieve(TEXTS[:2], memory, 3), [[0, 2, 4], [1, 3, 5]])
    np.testing.assert_array_equal(retrieve(TEXTS[:2], memory, 2, np.array([2, -1])), [[0, 4], [1, 3]])
    every = retrieve(TEXTS[:2], memory, 5, np.array([2, 5]))
    assert [sorted(row) for row in every.tolist()] == [[0, 1, 3, 4, 5], [0, 1, 2, 3, 4]]


def test_blocks_find_the_same(monkeypatch):
    exclude = np.arange(N)[::-1]
    whole = retrieve(IMAGES, TEXTS, 7, exclude)
    monkeypatch.setattr(retrieval, "ROWS", 33)
    np.testing.assert_array_equal(retrieve(IMAGES, TEXTS, 7, exclude), whole)


def test_embeddings_are_refined_by_the_papers_layer():
    head = randomised(untrained())
    rng = np.random.default_rng(6)
    queries = normalised(rng.normal(size=(M, D))).astype(np.float32)
    for refine, kind, keys, values in ((head.images, 0, IMAGES, TEXTS), (head.texts, 1, TEXTS, IMAGES)):
        params = jax.tree.map(lambda leaf, kind=kind: leaf[kind], head.params)
        for exclude in (None, retrieve(queries, keys, 1)[:, 0]):
            own = [-1] * M if exclude is None else exclude
            found = [values[found_by_loops(x, keys, K, i)] for x, i in zip(queries, own, strict=True)]
            expected = [layer_by_loops(params, x, near) for x, near in zip(queries, found, strict=True)]
            refined = refine(queries, exclude)
            assert refined.dtype == np.float32 and refined.shape == (M, D)
            np.testing.assert_allclose(refined, expected, rtol=1e-5, atol=1e-5)


def test_many_are_refined_in_blocks(monkeypatch):
    head = randomised(untrained())
    whole = head.images(IMAGES)
    monkeypatch.setattr(retrieval, "ROWS", M)
    np.testing.assert_allclose(head.images(IMAGES), whole, rtol=1e-5, atol=1e-5)


def test_it_begins_as_the_identity():
    head = untrained()
    np.testing.assert_allclose(head.images(IMAGES), IMAGES, rtol=0, atol=2e-7)
    np.testing.assert_allclose(head.texts(TEXTS), TEXTS, rtol=0, atol=2e-7)
    first, second = head.params["blocks_0"]["mlp"]["fc1"]["kernel"]
    assert not np.allclose(first, second), "layers of their own"
    assert not np.allclose(first, untrained(seed=1).params["blocks_0"]["mlp"]["fc1"]["kernel"][0])


def nce_by_loops(x, y, labels):
    """The paper's loss of one direction and the other, over 2 B; a target is uniform over equal labels."""
    logits = SCALE * x.astype(np.float64) @ y.T.astype(np.float64)
    total = 0
    for scores in (logits, logits.T):
        for i, row in enumerate(scores):
            same = labels == labels[i]
            total -= np.mean(row[same] - np.log(np.sum(np.exp(row))))
    return total / (2 * len(x))


def loss_by_loops(v, t, refined_v, refined_t, labels):
    pairs = (refined_v, refined_t), (refined_v, t), (v, refined_t)
    return sum(nce_by_loops(x, y, labels) for x, y in pairs)


@pytest.mark.parametrize("labels", [np.arange(12), np.arange(12) % 5])
def test_the_loss_is_the_papers(labels):
    embeddings = normalised(np.random.default_rng(3).normal(size=(4, 12, D))).astype(np.float32)
    loss = jax.jit(alignment)(*embeddings, SCALE, labels)
    np.testing.assert_allclose(loss, loss_by_loops(*embeddings, labels), rtol=1e-5)


def test_training_learns_to_use_what_is_found_also_of_concepts_it_has_not_seen():
    images, texts, labels = case(120)
    (v, new_v), (t, new_t), (seen, new) = (np.split(x, [100 * EACH]) for x in (images, texts, labels))
    head = reco(v, t, SCALE, targets=seen, steps=150, learning_rate=1e-2, **SMALL)
    own, some = np.arange(len(new)), slice(len(new))
    refined = head.images(v[some], own), head.texts(t[some], own)
    assert (
        loss_by_loops(v[some], t[some], *refined, seen[some]) < loss_by_loops(*[v[some], t[some]] * 2, seen[some]) / 2
    )

    def right(v, t):  # the share of pictures nearest to a text of their concept, and of texts nearest to such a picture
        nearest = [new[scores.argmax(1)] for scores in (v @ t.T, t @ v.T)]
        return np.mean(nearest == new, axis=1)

    informed = head._replace(memory=(new_v, new_t))
    assert right(informed.images(new_v, own), informed.texts(new_t, own)).min() > 0.7
    assert right(new_v, new_t).max() < 0.2
    assert right(head.images(new_v), head.texts(new_t)).max() < 0.2, "its memory lacks these concepts"


def test_training_pairs_do_not_find_themselves():
    train = functools.partial(reco, IMAGES, TEXTS, SCALE, **SMALL | dict(steps=3, learning_rate=1e-2))
    pairs, away = (IMAGES, TEXTS), (IMAGES[::-1], TEXTS[::-1])
    by_default, named = train(), train(memory=pairs, exclude=np.arange(N))
    elsewhere, itself = train(memory=away, exclude=np.arange(N)[::-1]), train(memory=pairs)
    jax.tree.map(np.testing.assert_array_equal, by_default.params, named.params)
    np.testing.assert_allclose(by_default.images(IMAGES), elsewhere.images(IMAGES), atol=1e-5)
    assert np.abs(by_default.images(IMAGES) - itself.images(IMAGES)).max() > 1e-3


def test_training_depends_on_targets_and_seed_alone():
    train = functools.partial(reco, IMAGES, TEXTS, SCALE, **SMALL | dict(steps=3, learning_rate=1e-2))
    first = train().images(IMAGES)
    np.testing.assert_array_equal(train().images(IMAGES), first)
    np.testing.assert_array_equal(train(targets=np.arange(N) + 7).images(IMAGES), first)
    for other in (dict(targets=LABELS), dict(seed=1)):
        assert np.abs(train(**other).images(IMAGES) - first).max() > 1e-3


@pytest.mark.parametrize("seed", [0, 1])
def test_the_first_loss_is_that_of_a_batch_unrefined(monkeypatch, seed):
    losses = []
    monkeypatch.setattr(retrieval, "finite", lambda leaf, values: losses.append(values) or leaf)
    reco(IMAGES, TEXTS, SCALE, targets=LABELS, seed=seed, **SMALL | dict(steps=3, learning_rate=1e-2))
    rows = shuffled(N, SMALL["batch_size"], 1, seed)[0]
    expected = 3 * nce_by_loops(IMAGES[rows], TEXTS[rows], LABELS[rows])
    np.testing.assert_allclose(losses[0][0], expected, rtol=1e-5)


def refused(message, call, *arguments, **options):
    with pytest.raises(UserError, match=message):
        call(*arguments, **options)


def test_what_does_not_fit_is_refused():
    train = functools.partial(reco, scale=SCALE, **SMALL)
    refused("training images have shape", train, IMAGES[:, 1:], TEXTS)
    refused("training texts have norms", train, IMAGES, 2 * TEXTS)
    refused("160 images, 159 texts", train, IMAGES, TEXTS[1:])
    refused("memory texts have shape", train, IMAGES, TEXTS, memory=(IMAGES, TEXTS[:, 1:]))
    refused("memory: 9 images, 8 texts", train, IMAGES, TEXTS, memory=(IMAGES[:9], TEXTS[:8]))
    refused("targets are float64", train, IMAGES, TEXTS, targets=LABELS / 2)
    refused("targets are int64 .159", train, IMAGES, TEXTS, targets=LABELS[1:])
    refused("batch_size is 1", reco, IMAGES, TEXTS, SCALE, batch_size=1)
    refused("k is 160; expected 1 to 159", reco, IMAGES, TEXTS, SCALE, k=160)
    refused("5 heads", reco, IMAGES, TEXTS, SCALE, heads=5)
    refused("diverged", train, IMAGES, TEXTS, learning_rate=np.inf, steps=3)
    refused("k is 0", retrieve, IMAGES, TEXTS, 0)
    refused("do not fit", retrieve, IMAGES, TEXTS[:, 1:], 1)
    for exclude in (np.zeros(3, int), np.zeros(N), np.full(N, N)):
        refused("exclude is", retrieve, IMAGES, TEXTS, 1, exclude)
    refused("images have norms", untrained().images, 2 * IMAGES)
    refused("images have shape", untrained().images, IMAGES[:, 1:])
    refused("a text per picture", untrained()._replace(memory=(IMAGES, TEXTS[1:])).texts, TEXTS)


def test_refined_names_are_a_classifier():
    head = untrained()
    names = normalised(np.stack([TEXTS[c == LABELS].mean(0) for c in range(CONCEPTS)]))
    logits = heads.zero_shot(head.texts(names), SCALE)(head.images(IMAGES))
    np.testing.assert_allclose(logits, SCALE * IMAGES @ names.T, atol=1e-4)
