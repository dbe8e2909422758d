"""Prompts near the base model's knowledge: their losses by hand, and their limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.few_shot import NAMES, Said, clip_like, params_with, pictures, tuned, unit_rows
from vlm_jax import objectives
from vlm_jax.adapt.prompts.coop import coop
from vlm_jax.adapt.prompts.guided import kgcoop, prograd
from vlm_jax.adapt.recipe import Adapted
from vlm_jax.adapt.tune import _Tuning
from vlm_jax.models import insertion
from vlm_jax.pretrained import class_embeddings


@pytest.fixture(scope="module")
def base():
    return clip_like(scan=True)


@pytest.fixture(scope="module")
def plain(base):
    return tuned(base, coop(base.model), pictures())


def test_without_guidance_they_are_coop(base, plain):
    found = tuned(base, kgcoop(base.model, weight=0.0), pictures())
    jax.tree.map(np.testing.assert_array_equal, found.params, plain.params)
    found = tuned(base, prograd(base.model, strength=0.0), pictures())  # another program, and so but for rounding
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found.params, plain.params)


@pytest.mark.parametrize("name", ["kgcoop", "prograd"])
def test_terms_by_hand(base, name):
    recipe = {"kgcoop": kgcoop, "prograd": prograd}[name](base.model)
    images, labels = pictures()
    model = insertion.inserted(base.model, *recipe.insertions(base.model, 0))
    leaves = params_with(base, recipe)
    own = recipe.begin(jax.random.key(1), model, leaves)
    token_ids = np.concatenate([np.full((3, 4), 7), base._token_ids(NAMES)[:, :4]], axis=1)
    zero_shot = class_embeddings(base.embed_texts, NAMES, ["{}"])
    classes = {"token_ids": jnp.asarray(token_ids), "zero_shot": jnp.asarray(zero_shot)}
    tuning = _Tuning(model, base.model, recipe, 1, 0.0, 0, False)
    batch = {"batch": {"image": base.embed_image_batch(images), "label": np.where(labels == 2, -1, labels)}}
    view, frozen = Adapted(model, recipe, leaves), {"base": base.params}
    value = lambda own: objectives.value(
        tuning.objective(classes), view, own, batch | {"classes": classes}, jax.random.key(0), frozen=frozen
    )
    metrics = jax.jit(value)(own)[1]
    scale = float(jnp.exp(base.params["logit_scale"]))
    text = np.asarray(model.apply({"params": view.effective(own)}, None, token_ids).text, np.float64)
    log_p = lambda texts: jax.nn.log_softmax(scale * batch["batch"]["image"].astype(np.float64) @ texts.T)
    kept = labels != 2
    np.testing.assert_allclose(metrics["classes/loss"], -log_p(text)[kept, labels[kept]].mean(), rtol=1e-4)
    if name == "kgcoop":
        np.testing.assert_allclose(metrics["prior/loss"], ((text - zero_shot) ** 2).sum(1).mean(), rtol=1e-4)
    else:
        wanted = log_p(zero_shot)
        divergence = (np.exp(wanted) * (wanted - log_p(text))).sum(1)[kept].mean()
        np.testing.assert_allclose(metrics["zero_shot/loss"], divergence, rtol=1e-3, atol=1e-6)


def test_a_step_of_prograd_never_raises_the_divergence_to_first_order():
    """Of the KL from the zero-shot predictions, for labels with and against them; text embeddings are what trains."""
    zero_shot, images = unit_rows(0, 3, 8), unit_rows(1, 6, 8)
    recipe = prograd(clip_like(scan=True).model)
    (term,) = recipe.terms
    moved_against = 0
    for seed in range(6):
        labels = (images @ zero_shot.T).argmin(1) if seed % 2 else (images @ zero_shot.T).argmax(1)
        rows = {"batch": {"label": labels}, "classes": {"zero_shot": zero_shot}}

        def divergence(text, rows=rows):
            features = {"batch": (images, images), "classes": text}
            return term.loss(Said(scale=20.0), features, rows, None)[0]

        classes = lambda text, labels=labels: -jnp.mean(jax.nn.log_softmax(20 * images @ text.T)[np.arange(6), labels])
        with jax.enable_x64(True):
            text = 0.3 * jnp.asarray(zero_shot + 0.3 * unit_rows(seed + 2, 3, 8))
            own, other = jax.grad(classes)(text), jax.grad(divergence)(text)
            step = recipe.gradients({"classes": own, "zero_shot": other}, None)
            slope = jax.jvp(divergence, (text,), (-step,))[1]
            assert slope < 1e-12
            moved_against += float(jnp.vdot(own, other)) < 0
            assert float(jax.jvp(classes, (text,), (-step,))[1]) < 0  # it still learns
    assert moved_against == 3
