"""Triples beside a text, against loops in fp64."""

from functools import partial

import jax
import numpy as np
import pytest

from tests.support import lookup
from vlm_jax import objectives
from vlm_jax.errors import UserError
from vlm_jax.objectives.contrastive.knowledge import ROLES, Knowledge

N, WIDTH, T, L, VOCAB = 5, 6, 3, 2, 9
IDS = np.arange(N)
TRIPLES = np.random.default_rng(0).integers(1, VOCAB, size=(N, T, 3, L))
TRIPLES[1, 1:] = TRIPLES[3] = 0  # texts with fewer triples, with none
TRIPLES[0, :, :, 1] = 0  # shorter words
BATCH = {"image": IDS, "token_ids": IDS[:, None], "triples": TRIPLES}
ENCODER = dict(width=4, heads=2, mlp_dim=8, depth=0, dtype="float64")
SECTION = dict(name="knowledge", vocab_size=VOCAB, encoder=ENCODER, strength=0.5)


@pytest.fixture(autouse=True)
def fp64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def params():
    with jax.enable_x64(True):
        base = lookup.tables(size=N, width=WIDTH)
        model = lookup.Lookup(N, WIDTH)
        objective = objectives.build(SECTION, model)
        make = jax.jit(partial(objectives.make, objective, model))
        made = make(base, BATCH, jax.random.key(0))[0]
        rng = np.random.default_rng(1)
        return jax.tree.map(lambda x: np.asarray(x) + 0.1 * rng.normal(size=x.shape), made)


def encoder(depth):
    return Knowledge(**ENCODER | {"depth": depth}, pool="none", vocab_size=VOCAB, out_dim=WIDTH)


@jax.jit
def encoded(own, triples):
    return encoder(0).apply({"params": own}, triples, 0)


def test_the_loss_is_clip_s_of_texts_with_knowledge(params):
    def by_hand(params, batch):
        own = params["objective"]["knowledge"]["encoder"]
        texts = params["text"][IDS] + 0.5 * np.asarray(encoded(own, TRIPLES))
        logits = lookup.logits_of(params, params["image"][IDS], texts)
        return lookup.softmax(*logits, np.eye(N), np.eye(N))

    got = lookup.differentiate(SECTION, params, BATCH)
    lookup.check(got, by_hand, params, BATCH)
    assert got[1]["knowledge/triples"] == (T * 3 + 1) / N


def test_without_strength_it_is_contrastive(params):
    base = {key: value for key, value in params.items() if key != "objective"}
    want = lookup.differentiate(dict(penalty="sigmoid", targets="image"), base, BATCH)
    section = SECTION | dict(strength=0.0, penalty="sigmoid", targets="image")
    got = lookup.differentiate(section, params, BATCH)
    assert got[0] == want[0]
    jax.tree.map(np.testing.assert_array_equal, {key: got[2][key] for key in base}, dict(want[2]))


def test_the_encoder_by_hand(params):
    """The sum of the roles' mean words, normalised, averaged over triples, projected."""
    own = params["objective"]["knowledge"]["encoder"]
    norm, got = next(own[name] for name in own if "norm" in name), encoded(own, TRIPLES)
    for i in range(N):
        rows = []
        for triple in TRIPLES[i]:
            if triple.any():
                x = sum(
                    np.mean([own[role]["embedding"][w] for w in words if w], axis=0)
                    for role, words in zip(ROLES, triple, strict=True)
                )
                rows.append(norm["scale"] * (x - x.mean()) / np.sqrt(x.var() + 1e-6) + norm["bias"])
        want = np.zeros(WIDTH)
        if rows:
            want = np.mean(rows, axis=0) @ own["head"]["kernel"] + own["head"]["bias"]
            want = want / np.linalg.norm(want)
        np.testing.assert_allclose(got[i], want, rtol=1e-6, atol=1e-7)


def test_roles_matter_and_the_order_of_triples_does_not():
    """With a block, in which triples see each other, and no padding."""
    module = encoder(1)
    own = jax.jit(module.init)(jax.random.key(0), TRIPLES, 0)["params"]
    run = jax.jit(lambda triples: module.apply({"params": own}, triples, 0))
    whole = np.asarray(run(TRIPLES))
    np.testing.assert_allclose(run(TRIPLES[:, ::-1]), whole, rtol=1e-9, atol=1e-12)
    assert np.abs(run(TRIPLES[:, :, ::-1]) - whole)[0].max() > 1e-3
    assert not whole[3].any()
    np.testing.assert_allclose(np.linalg.norm(whole[[0, 1, 2, 4]], axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("section", "batch", "message"),
    [
        (SECTION, BATCH | {"triples": TRIPLES[:, 0]}, r"`triples` has shape \[5, 3, 2\]; expected triples"),
        (SECTION | {"vocab_size": None}, BATCH, "the run has no tokenizer; set vocab_size"),
        (SECTION | {"key": "facts"}, BATCH, "`knowledge` needs `facts`, which neither the batch nor"),
        (SECTION | {"encoder": {"widht": 3}}, BATCH, "config.objective.encoder has no key `widht`"),
    ],
)
def test_mistakes_are_named(section, batch, message, params):
    with pytest.raises(UserError, match=message):
        lookup.differentiate(section, params, batch)
