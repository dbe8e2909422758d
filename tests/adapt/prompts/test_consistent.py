"""Prompts near the base model: their losses against loops, their limits, averages over epochs, changed pictures."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.few_shot import NAMES, Said, clip_like, loss_of, pictures, tuned, unit_rows
from vlm_jax.adapt import tables
from vlm_jax.adapt.prompts.consistent import coprompt, promptsrc, restore, view
from vlm_jax.adapt.prompts.placing import Independent

B, C, E, T = 5, 3, 8, 4
X, BASE, TEXT, ZERO, DESCRIBED = (
    unit_rows(seed, *shape) for seed, shape in enumerate([(B, E), (B, E), (C, E), (C, E), (C, T, E)])
)
LABELS = np.array([0, 2, -1, 1, 2])
REAL = [i for i in range(B) if LABELS[i] >= 0]
SAID = {
    "batch": Said(Said(image_embedding=BASE), image_embedding=X, image=np.zeros((B, 4, 4, 3)), label=LABELS),
    "classes": Said(text_embedding=TEXT, zero_shot=ZERO, ensembled=ZERO, described=DESCRIBED),
}


def terms(recipe):
    return {term.name: term for term in recipe.terms}


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


def test_promptsrc_is_the_papers():
    """L1 of both embeddings over all numbers, KL(zero-shot || prompted) over all logits; weights 10, 25 and 1."""
    own = terms(promptsrc(clip_like(scan=True).model))
    assert {name: term.weight for name, term in own.items()} == {"pictures": 10.0, "texts": 25.0, "logits": 1.0}
    found = {name: loss_of(term, SAID, SAID) for name, term in own.items()}
    l1 = lambda x, y, rows: np.mean([abs(x[i, e] - y[i, e]) for i in rows for e in range(E)])
    divergence = 0.0
    for i in REAL:
        p, q = softmax(10 * TEXT @ X[i]), softmax(10 * ZERO @ BASE[i])
        divergence += sum(q[c] * (math.log(q[c]) - math.log(p[c])) for c in range(C)) / (len(REAL) * C)
    want = {"pictures": l1(X, BASE, REAL), "texts": l1(TEXT, ZERO, range(C)), "logits": divergence}
    np.testing.assert_allclose([found[name] for name in want], list(want.values()), rtol=1e-6)


def test_coprompt_is_the_papers():
    """1 - cos for pictures and for classes, with the prompt that the step has drawn."""
    (term,) = coprompt(clip_like(scan=True).model).terms
    of_pictures = np.mean([1 - X[i] @ BASE[i] for i in REAL])
    of_texts = [np.mean([1 - TEXT[c] @ DESCRIBED[c, t] for c in range(C)]) for t in range(T)]
    found = {round(loss_of(term, SAID, SAID, jax.random.key(seed)), 6) for seed in range(20)}
    assert found == {round(of_pictures + text, 6) for text in of_texts}


def test_restore_compares_how_far_both_towers_moved():
    (term,) = restore(clip_like(scan=True).model).terms
    length = lambda x: math.sqrt(sum(v * v for v in x))
    image = np.mean([length(X[i] - BASE[i]) for i in REAL])
    text = np.mean([length(TEXT[c] - ZERO[c]) for c in range(C)])
    np.testing.assert_allclose(loss_of(term, SAID, SAID), (image - text) ** 2, rtol=1e-6)


def test_without_its_losses_promptsrc_is_its_prompts():
    base = clip_like(scan=True)
    nothing = dict(image_weight=0.0, text_weight=0.0, logit_weight=0.0, mean=None, templates=None)
    found = tuned(base, promptsrc(base.model, **nothing), pictures())
    want = tuned(base, Independent(), pictures())
    jax.tree.map(np.testing.assert_array_equal, found.params, want.params)
    for recipe in (coprompt(base.model, weight=0.0), restore(base.model, weight=0.0)):
        assert not recipe.terms and not recipe.tables


def test_tables(base, pictures):
    images, labels = pictures
    known = tables.Known(base, images, labels, NAMES)
    x = base.embed_image_batch(images).astype(np.float64)
    want = [np.mean([x[i] for i in range(12) if labels[i] == c], axis=0) for c in range(3)]
    np.testing.assert_allclose(tables.prototypes(known), want, atol=1e-6)
    several = tables.described(["a {}", "{} cat"])(known)
    want = base.embed_texts([f"{name} cat" for name in NAMES])
    np.testing.assert_allclose(several[:, 1], want, rtol=1e-5, atol=1e-6)
    mean = several.mean(1)
    np.testing.assert_allclose(
        tables.ensembled(["a {}", "{} cat"])(known), mean / np.linalg.norm(mean, axis=1)[:, None], atol=1e-6
    )


@pytest.mark.parametrize("least", [1.0, 0.5])
def test_a_view_is_a_crop(least):
    """At full size it is the picture or its mirror image; of a slope, a crop is a part of the slope."""
    slope = jnp.broadcast_to(jnp.arange(16.0)[:, None, None], (16, 16, 3))
    views = jax.vmap(lambda key: view(key, slope, least))(jax.random.split(jax.random.key(0), 6))
    np.testing.assert_allclose(views, jnp.flip(views, 2), atol=1e-4)  # a column is like the others
    inner = np.diff(np.asarray(views)[:, 2:-2, 8, 0], axis=1)  # rows rise by the share of the height
    assert (inner > 0.45).all() and (inner < 1.01).all()
    if least == 1.0:
        np.testing.assert_allclose(views, jnp.broadcast_to(slope, views.shape), atol=1e-4)
    else:
        assert inner.min() < 0.9
