"""Image-text matching: which pairs are drawn, from which rows, and what they are told to be."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.towers import Towers
from vlm_jax import objectives
from vlm_jax.errors import UserError
from vlm_jax.objectives.sum import Sum

B = 8
RNG = np.random.default_rng(0)
BATCH = {
    "image": RNG.normal(size=(B, 4, 4, 3)).astype(np.float32),
    "token_ids": np.concatenate([np.arange(1, B + 1)[:, None], RNG.integers(1, 14, (B, 2))], 1),  # all differ
    "concept": np.array([0, 1, 0, 2, 0, 1, 3, 0]),
    "half": np.arange(B) * 2 // B,
}


def build(**options):
    return objectives.build(dict(name="matching", fusion=dict(width=8, depth=1, heads=2), **options), Towers())


def begin(objective, seed=1):
    """Random parameters, with the fusion's."""
    shapes = jax.eval_shape(Towers().init, jax.random.key(0), BATCH["image"], BATCH["token_ids"])["params"]
    shapes = jax.eval_shape(partial(objectives.make, objective, Towers()), shapes, BATCH, jax.random.key(0))[0]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape, scale=0.3), x.dtype), shapes)


def mined(objective, params, draws=1):
    """The rows "pairs" of some draws, with the rows that they name: {key: [draws, 3 B, ...]}; and the similarities."""

    @jax.jit
    @jax.vmap
    def run(rng):
        parts = Sum(objective, Towers(), BATCH, rng)
        features, rows = parts.encode_all(params)
        found = parts._resolved("pairs", rows["pairs"], parts.before("pairs", features), rows)
        return found, features["batch"]["pairs"]

    found, seen = run(jax.random.split(jax.random.key(0), draws))
    seen = jax.tree.map(lambda x: np.asarray(x[0]), seen)
    return jax.tree.map(np.asarray, found), seen


def rows_of(tokens, all_tokens):
    """The number of the row that each entry is."""
    same = np.all(tokens[:, :, None] == all_tokens, axis=tuple(range(3, tokens.ndim + 1)))
    assert np.all(same.sum(-1) == 1)
    return same.argmax(-1)


def test_pairs_are_true_ones_then_wrong_texts_then_wrong_images():
    objective = build()
    pairs, seen = mined(objective, begin(objective), draws=64)
    images, texts = (
        rows_of(pairs["image_tokens"], seen["image_tokens"]),
        rows_of(pairs["token_ids"], BATCH["token_ids"]),
    )
    np.testing.assert_array_equal(pairs["text_tokens"], seen["text_tokens"][texts])
    own, (wrong_text, wrong_image) = np.arange(B), (np.s_[:, B : 2 * B], np.s_[:, 2 * B :])
    assert np.all(images[:, :B] == own) and np.all(texts[:, :B] == own)
    assert np.all(images[wrong_text] == own) and np.all(texts[wrong_text] != own)
    assert np.all(images[wrong_image] != own) and np.all(texts[wrong_image] == own)
    np.testing.assert_array_equal(pairs["match"], np.broadcast_to(np.arange(3 * B) < B, (64, 3 * B)))


def test_wrong_ones_are_drawn_by_their_softmax():
    objective = build()
    pairs, seen = mined(objective, begin(objective), draws=2000)
    logits = seen["scale"][0] * seen["image_embedding"] @ seen["text_embedding"].T - 1e9 * np.eye(B)
    softmax = lambda x: np.exp(x) / np.exp(x).sum(1, keepdims=True)
    images, texts = (
        rows_of(pairs["image_tokens"], seen["image_tokens"]),
        rows_of(pairs["token_ids"], BATCH["token_ids"]),
    )
    for drawn, want in ((texts[:, B : 2 * B], softmax(logits)), (images[:, 2 * B :], softmax(logits.T))):
        shares = np.mean(drawn[:, :, None] == np.arange(B), axis=0)
        np.testing.assert_allclose(shares, want, atol=0.05)  # four standard deviations


@pytest.mark.parametrize("groups", [1, 2])
def test_pairs_that_match_by_label_are_never_wrong(groups):
    """With groups, all rows of a pair are of one half of the batch."""
    objective = build(targets="concept", groups=groups)
    pairs, seen = mined(objective, begin(objective), draws=200)
    cut = lambda x: x.reshape(200, groups, 3, B // groups)
    images = cut(rows_of(pairs["image_tokens"], seen["image_tokens"]))
    texts, match = cut(rows_of(pairs["token_ids"], BATCH["token_ids"])), cut(pairs["match"])
    part = np.arange(groups)[:, None, None]
    assert np.all(images * groups // B == part) and np.all(texts * groups // B == part)
    same = BATCH["concept"][images] == BATCH["concept"][texts]
    np.testing.assert_array_equal(same, match)
    assert np.all(same[:, :, 0]) and not np.any(same[:, :, 1:])


def test_where_nothing_is_wrong_the_pair_is_true():
    """All texts of a half match its images."""
    objective = build(targets="half", groups=2)
    parts = Sum(objective, Towers(), BATCH, jax.random.key(0))
    _, rows = parts.encode_all(begin(objective))
    assert np.all(rows["pairs"]["match"] == 1)


def test_the_loss_is_the_cross_entropy_of_the_fusion_and_reaches_both_towers():
    objective = build()
    params, rng = begin(objective), jax.random.key(0)
    run = jax.jit(
        lambda k: objectives.value_and_grad(objective, Towers(), params, BATCH, rng, accumulate=k), static_argnums=0
    )
    loss, metrics, grads, features = run(1)
    logits = np.asarray(features["pairs"]["matching"], np.float64)
    right = (np.arange(3 * B) < B).astype(int)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    np.testing.assert_allclose(loss, -log_p[np.arange(3 * B), right].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["matching/accuracy"], np.mean(logits.argmax(1) == right), rtol=1e-6)
    assert all(np.any(grads[name]["kernel"]) for name in ("image_fc",)) and np.any(grads["embed"]["embedding"])
    assert set(grads["objective"]["matching"]) == {"fusion"}
    assert not np.any(grads["image_head"]["kernel"]) and not np.any(grads["logit_scale"])  # they only choose


def test_chosen_rows_are_mined_for_pairs():
    """A selection of a selection: matching on the learnable rows alone, with labels that ride along."""
    section = dict(
        terms=dict(matching=dict(on="chosen", targets="concept", fusion=dict(width=8, depth=1, heads=2))),
        selections=dict(chosen=dict(name="learnability", share=0.5)),
        teachers=dict(reference=dict(decay=1.0)),
    )
    objective = objectives.build(section, Towers())
    params = begin(objective)
    state = {"teachers": {"reference": jax.tree.map(lambda p: 2 * p, params)}}
    run = lambda k: jax.jit(partial(objectives.value_and_grad, objective, Towers(), state=state, accumulate=k))(
        params, BATCH, jax.random.key(0)
    )
    one, four = run(1), run(4)
    assert one[3]["pairs"]["matching"].shape == (12, 2)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), four[:3], one[:3])


def test_soft_targets_are_no_matches():
    with pytest.raises(
        UserError, match="hard pairs need targets that match or do not, such as `identity`, not soft ones"
    ):
        build(targets="cwcl")
