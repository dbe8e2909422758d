"""Mixed negatives against loops in fp64, and where they are CLIP's."""

import jax
import numpy as np
import pytest

from tests.support import lookup
from vlm_jax import objectives
from vlm_jax.errors import UserError
from vlm_jax.objectives.contrastive.mixing import geodesic, uniformity

N, WIDTH = 6, 5
IDS = np.arange(N)
BATCH = {"image": IDS, "token_ids": IDS[:, None], "concept": np.array([0, 1, 0, 2, 0, 1])}


@pytest.fixture(autouse=True)
def fp64():
    with jax.enable_x64(True):
        yield


def run(section, **options):
    return lookup.differentiate({"name": "mixed", **section}, lookup.tables(size=N, width=WIDTH), BATCH, **options)


def arc(x, y, q):
    angle = np.arccos(x @ y)
    return (np.sin(q * angle) * x + np.sin((1 - q) * angle) * y) / np.sin(angle)


def by_loops(params, q, scale, same, loss):
    images, texts = params["image"], params["text"]
    scale, bias = np.exp(params["logit_scale"]) if scale is None else scale, params["logit_bias"]
    of_images, of_texts = np.zeros((N, N)), np.zeros((N, N))
    for i in range(N):
        for j in range(N):
            other = arc(images[j], texts[j], q)
            of_images[i, j] = scale * images[i] @ (texts[j] if same[i, j] else other) + bias
            of_texts[i, j] = scale * texts[i] @ (images[j] if same[i, j] else other) + bias
    return 2 * loss(of_images, of_texts, same, same)


@pytest.mark.parametrize(
    ("penalty", "targets", "scale"),
    [("softmax", "identity", None), ("softmax", "concept", 3.0), ("sigmoid", "identity", 3.0)],
)
def test_loops(penalty, targets, scale):
    same = (BATCH["concept"][:, None] == BATCH["concept"]).astype(float) if targets == "concept" else np.eye(N)
    got = run(dict(share=0.3, scale=scale, penalty=penalty, targets=targets))
    params = lookup.tables(size=N, width=WIDTH)
    lookup.check(got, lambda p, b: by_loops(p, 0.3, scale, same, lookup.LOSSES[penalty]), params, BATCH)


def test_the_ends_of_the_arc_are_the_texts_and_the_images():
    """At the share 0 images see CLIP's logits, at the share 1 texts do."""
    params = lookup.tables(size=N, width=WIDTH)
    of_images, of_texts = lookup.logits_of(params, params["image"], params["text"])
    within = np.exp(params["logit_scale"]) * params["text"] @ params["text"].T + params["logit_bias"]
    np.fill_diagonal(within, np.diag(of_texts))
    eye = np.eye(N)
    np.testing.assert_allclose(run(dict(share=0.0))[0], 2 * lookup.softmax(of_images, within, eye, eye), rtol=1e-12)
    within = np.exp(params["logit_scale"]) * params["image"] @ params["image"].T + params["logit_bias"]
    np.fill_diagonal(within, np.diag(of_texts))
    np.testing.assert_allclose(run(dict(share=1.0))[0], 2 * lookup.softmax(within, of_texts, eye, eye), rtol=1e-12)
    np.testing.assert_array_equal(geodesic(params["image"], params["text"], 0.0), params["text"])
    np.testing.assert_array_equal(geodesic(params["image"], params["text"], 1.0), params["image"])


def test_arcs_are_on_the_sphere_and_points_without_an_arc_are_finite():
    params = lookup.tables(size=N, width=WIDTH)
    points = geodesic(params["image"], params["text"], 0.4)
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1, rtol=1e-12)
    x = params["image"]
    np.testing.assert_allclose(geodesic(x, x, 0.4), x, rtol=1e-12)
    grads = jax.grad(lambda x, y: geodesic(x, y, 0.4).sum(), argnums=(0, 1))
    assert all(np.all(np.isfinite(g)) for y in (x, -x) for g in grads(x, y))


def test_the_share_is_drawn_anew_and_metrics_are_of_the_sphere():
    params, model = lookup.tables(size=N, width=WIDTH), lookup.Lookup(N, WIDTH)
    objective = objectives.build(dict(name="mixed"), model)
    drawn = jax.jit(lambda rng: objectives.value(objective, model, params, BATCH, rng))
    first, second = (drawn(jax.random.key(seed)) for seed in (0, 1))
    assert first[0] != second[0]
    spread = lambda z: np.log(
        np.mean([np.exp(-2 * np.sum((a - b) ** 2)) for i, a in enumerate(z) for j, b in enumerate(z) if i != j])
    )
    np.testing.assert_allclose(uniformity(params["image"]), spread(params["image"]), rtol=1e-12)
    both = (spread(params["image"]) + spread(params["text"])) / 2
    np.testing.assert_allclose(first[1]["mixed/uniformity"], both, rtol=1e-12)
    square = np.mean(np.sum((params["image"] - params["text"]) ** 2, axis=1))
    np.testing.assert_allclose(first[1]["mixed/alignment"], square, rtol=1e-12)


def test_a_beta_without_a_distribution_is_named():
    with pytest.raises(UserError, match="beta is 0; expected a number above 0"):
        run(dict(beta=0))
