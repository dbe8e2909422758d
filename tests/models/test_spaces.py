"""Spaces against loops in fp64, sparsemax against a search; where they are the towers' own embeddings."""

import itertools
import math

import jax
import numpy as np
import pytest

from tests.support.models import IMAGES, TOKENS, initial, run, section
from vlm_jax import models
from vlm_jax.errors import UserError
from vlm_jax.models import Encoded
from vlm_jax.models.spaces import boxes, codes, lexical, log_containment, sparsemax

RNG = np.random.default_rng(0)
ROWS = [RNG.normal(size=(3, 4, 6)), np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], bool)]
TABLE = RNG.normal(size=(9, 6))


@pytest.fixture(autouse=True)
def fp64():
    with jax.enable_x64(True):
        yield


def nearest(z):
    """The point of the simplex nearest to z: the best of all supports."""
    best = None
    for size in range(1, len(z) + 1):
        for support in map(list, itertools.combinations(range(len(z)), size)):
            point = np.zeros(len(z))
            point[support] = z[support] - (z[support].sum() - 1) / size
            if np.all(point >= 0) and (best is None or np.sum((point - z) ** 2) < np.sum((best - z) ** 2)):
                best = point
    return best


def test_sparsemax_is_the_nearest_point_of_the_simplex():
    z = np.random.default_rng(1).normal(size=(20, 5)) * np.repeat([0.2, 3.0], 10)[:, None]
    got = np.asarray(sparsemax(z))
    np.testing.assert_allclose(got, [nearest(row) for row in z], atol=1e-14)
    assert np.any(got == 0) and np.any(np.all(got > 0, axis=1))
    weights = np.arange(5.0)
    grads = jax.vmap(jax.grad(lambda z: sparsemax(z) @ weights))(z)
    for row, point, grad in zip(z, got, grads, strict=True):
        slopes = [(nearest(row + e) - nearest(row - e)) @ weights / 2e-6 for e in 1e-6 * np.eye(5)]
        np.testing.assert_allclose(grad, slopes, atol=1e-6)
        np.testing.assert_array_equal(np.asarray(grad)[point == 0], 0)
    np.testing.assert_allclose(sparsemax(z / 1e-4), np.eye(5)[np.argmax(z, axis=1)], atol=1e-12)  # the best alone


def check(module, by_hand, parts):
    """Compares embeddings and parts with loops over rows and tokens, and the gradient with differences of the loops."""
    encoded = lambda tokens: Encoded(None, tokens, ROWS[1])
    params = module.init(jax.random.key(0), encoded(ROWS[0]), "image", TABLE)["params"]
    params = jax.tree.map(lambda x: np.random.default_rng(x.size).normal(size=x.shape), params)
    apply = jax.jit(lambda params, tokens: module.apply({"params": params}, encoded(tokens), "image", TABLE))
    embedding, found = apply(params, ROWS[0])
    loops = lambda params, tokens: np.stack([by_hand(params, row[m]) for row, m in zip(tokens, ROWS[1], strict=True)])
    part = loops(params, ROWS[0])
    np.testing.assert_allclose(found[parts], part, rtol=1e-10, atol=1e-14)
    target = np.random.default_rng(7).normal(size=part.shape)
    value = lambda params, tokens: np.sum(loops(params, tokens) * target)
    grads = jax.grad(lambda *args: (apply(*args)[1][parts] * target).sum(), (0, 1))(params, ROWS[0])
    move = jax.tree.map(lambda p: np.random.default_rng(p.size + 1).normal(size=p.shape), (params, ROWS[0]))
    moved = [value(*jax.tree.map(lambda p, m, s=s: p + s * m, (params, ROWS[0]), move)) for s in (1e-6, -1e-6)]
    slope = sum(np.vdot(g, m) for g, m in zip(*map(jax.tree.leaves, (grads, move)), strict=True))
    np.testing.assert_allclose(slope, (moved[0] - moved[1]) / 2e-6, rtol=1e-5)
    return params, embedding, part


def norm(x, params):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-6) * params["scale"] + params["bias"]


def test_codes():
    def by_hand(params, tokens):
        query, best = params["image"], np.full(5, -np.inf)
        for token in tokens:
            x = norm(token, query["norm1"]) @ query["fc1"]["kernel"] + query["fc1"]["bias"]
            x = x * 0.5 * (1 + np.array([math.erf(v) for v in x / 2**0.5]))
            x = norm(x, query["norm2"]) @ query["fc2"]["kernel"] + query["fc2"]["bias"]
            best = np.maximum(best, params["codes"] @ x / 4**0.5 / 2.0)
        return nearest(best)

    params, embedding, weights = check(codes(size=5, width=4, temperature=2.0)(), by_hand, "codes")
    want = weights @ params["codes"]
    np.testing.assert_allclose(embedding, want / np.linalg.norm(want, axis=1, keepdims=True), rtol=1e-7)
    np.testing.assert_allclose(np.sum(weights, axis=1), 1, rtol=1e-12)


def test_words():
    def by_hand(params, tokens):
        mapped = [token @ params["image_map"]["kernel"] + params["image_map"]["bias"] for token in tokens]
        return np.array([max(np.log1p(max(0.0, x @ word)) for x in mapped) for word in TABLE])

    _, embedding, words = check(lexical()(), by_hand, "words")
    assert np.any(words == 0)
    np.testing.assert_allclose(embedding, words / np.linalg.norm(words, axis=1, keepdims=True), rtol=1e-7)


def test_boxes():
    def by_hand(params, tokens):
        own = tokens.mean(0) @ params["image_box"]["kernel"] + params["image_box"]["bias"]
        corners = lambda b: [b[:2] + s * np.log1p(np.exp(b[2:])) / 2 for s in (-1, 1)]
        log_side = lambda lower, upper: np.log(np.log1p(np.exp((upper - lower) / 0.5 - 2 * np.euler_gamma)))
        (low, high), found = corners(own), []
        for concept in params["concepts"]:
            bottom, top = corners(concept)
            lower = 0.5 * np.log(np.exp(low / 0.5) + np.exp(bottom / 0.5))
            upper = -0.5 * np.log(np.exp(-high / 0.5) + np.exp(-top / 0.5))
            found.append(np.sum(log_side(lower, upper) - log_side(low, high)))
        return np.array(found)

    _, embedding, log_p = check(boxes(concepts=5, width=2, temperature=0.5)(), by_hand, "log_entailed")
    assert np.all(log_p < 0)
    p = np.exp(log_p)
    np.testing.assert_allclose(embedding, p / np.linalg.norm(p, axis=1, keepdims=True), rtol=1e-7)


def test_cold_boxes_are_those_of_geometry():
    """The shares of a box that lie in others, by their volumes: half of it, all of it, none of it."""
    inner = np.array([[0.0, 0.0], [2.0, 1.0]])
    outer = np.array([[[1.0, -1.0], [-3.0, -3.0], [5.0, 5.0]], [[4.0, 2.0], [9.0, 9.0], [6.0, 6.0]]])
    p = np.exp(log_containment(outer, inner, 1e-6))
    np.testing.assert_allclose(p, [0.5, 1.0, 0.0], atol=1e-5)


def test_the_means_of_normal_distributions_are_the_towers_own_embeddings():
    """Bit for bit; and standard deviations begin where they are set."""
    config = section("two_tower")
    wide, plain = models.build(config | {"space": dict(name="gaussian", sigma=0.25)}), models.build(config)
    params = initial(wide, IMAGES, TOKENS)
    for side in ("image", "text"):
        params["space"][f"{side}_log_sigma"]["kernel"] *= 0
        params["space"][f"{side}_log_sigma"]["bias"] = np.full(16, np.log(0.25))
    own = {name: leaf for name, leaf in params.items() if name != "space"}
    got, want = run(wide, params, IMAGES, TOKENS), run(plain, own, IMAGES, TOKENS)
    np.testing.assert_array_equal(got.image, want.image)
    np.testing.assert_array_equal(got.text, want.text)
    np.testing.assert_allclose(got.text_parts["sigma"], 0.25, rtol=1e-6)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (dict(name="codes", weights="hard"), "space.weights is `hard`; expected one of: sparsemax, softmax"),
        (dict(name="lexical", activation="exp"), "space.activation is `exp`; expected one of: log1p, elu1p"),
        ("words", "config.model.space is `words`; expected one of: codes, gaussian, lexical, boxes"),
        ("gaussian", "`gaussian` needs one vector of the image tower as mean; change its pool"),
    ],
)
def test_mistakes_are_named(space, message):
    config = section("two_tower") | {"space": space}
    if space == "gaussian":
        config["image"] = config["image"] | {"pool": "none", "out_dim": None}
    with pytest.raises(UserError, match=message):
        jax.eval_shape(models.build(config).init, jax.random.key(0), IMAGES, TOKENS)
