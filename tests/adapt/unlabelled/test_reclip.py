"""ReCLIP: its classifier without training, its two losses, and what each of them moves."""

import numpy as np
import pytest

from tests.support.few_shot import Said, few_shot_task, loss_of, moved, unit_rows
from vlm_jax.adapt.methods import fit
from vlm_jax.adapt.unlabelled.pseudo_labels import by_neighbours, without_first_directions
from vlm_jax.adapt.unlabelled.reclip import agreed, agreeing, centroids, reclip
from vlm_jax.errors import UserError


@pytest.fixture
def task(base, pictures):
    return few_shot_task(base, pictures)


def test_at_rate_0_it_is_the_base_model_with_a_classifier(base, task):
    """Parameters are the base model's, bit for bit; the classifier is that of propagated labels and names."""
    pool, text = task[2].pool.features.astype(np.float64), task[2].text
    found = fit("reclip")(base, *task, epochs=1, steps=1, neighbours=3, alpha=0.5, learning_rate=0.0)
    assert not moved(base, found)
    labels = by_neighbours(pool, text, without_first_directions(text), 3, 0.5)
    for c in range(3):
        own = np.concatenate([pool[labels == c], text[c : c + 1]])
        centre = own.sum(0) / np.linalg.norm(own.sum(0))
        wanted = np.exp(float(base.params["logit_scale"])) * (centre + text[c]) / 2
        np.testing.assert_allclose(found.head.weights[:, c], wanted, rtol=1e-4, atol=1e-5)


def test_norms_alone_move(base, task):
    found = moved(base, fit("reclip")(base, *task, steps=4, neighbours=3, learning_rate=1e-1))
    assert {name.split("/")[0] for name in found} == {"image", "text"} and all("norm" in name for name in found)


def test_losses_by_hand():
    """V's pictures by the centres, T's texts on the base model's pictures; disagreements do not count."""
    v, base, texts, centres = (unit_rows(i, n, 4) for i, n in enumerate((5, 5, 3, 3)))
    labels = agreed(np.array([0, 1, 2, 1, 0]), np.array([0, 1, 1, 1, 2]))
    assert labels.tolist() == [0, 1, -1, 1, -1]
    pool = Said(image_embedding=v, feature=base)
    said = {"pool": pool, "classes": Said(text_embedding=texts, centres=centres)}
    recipe = agreeing({})
    for term, x, w in zip(recipe.terms, (v, base), (centres, texts), strict=True):
        losses = []
        for i in (0, 1, 3):
            e = np.exp(10 * x[i] @ w.T)
            losses.append(-np.log(e[labels[i]] / e.sum()))
        found = loss_of(term, said, {"pool": {"label": labels}, "classes": {}})
        np.testing.assert_allclose(found, np.mean(losses), rtol=1e-6)
    assert not recipe.names_classes
    means = centroids(v, np.array([0, 0, 0, 2, 2]), texts)
    np.testing.assert_allclose(means[1], texts[1], atol=1e-6)  # a class without a picture keeps its name
    with pytest.raises(UserError, match="pictures and texts agree on no pseudo-label; a larger pool or fewer"):
        agreed(np.array([0, 1]), np.array([1, 0]))


def test_what_is_wrong_is_named(base, task):
    with pytest.raises(UserError, match=r"reclip\.epochs is 0; expected 1 or more"):
        reclip(base.model, epochs=0)
    with pytest.raises(UserError, match="drop is 1, of 1 directions of the names; expected fewer"):
        fit("reclip")(base, *task, rank=1, steps=1)
    with pytest.raises(UserError, match="reclip learns from pictures without labels; give a pool"):
        fit("reclip")(base, *task[:2], task[2]._replace(pool=None))
