"""Terms on a picture's own text and its hard negatives, against loops in fp64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import lookup, models
from tests.support.several_texts import GIVEN, IDS, SIZE, TEXTS, WIDTH, N
from vlm_jax.errors import UserError
from vlm_jax.models.two_tower import token_embeddings

P, L = 4, 3  # patches, words of a text
OWN = 16 + np.arange(N)[:, None]  # rows of the table of texts
BATCH = {"image": IDS, "token_ids": OWN, "texts": np.where(GIVEN[..., None], TEXTS, 0)}
OTHERS = np.array([[[OWN[j, 0]] for j in range(N) if j != i] for i in range(N)])
ALL = {"image": IDS, "token_ids": OWN, "texts": OTHERS}
WORDS = np.array([[i + 1, i + 2, 0] if i % 2 else [i + 1, i + 2, i + 3] for i in range(SIZE)])


@pytest.fixture(autouse=True)
def fp64():
    with jax.enable_x64(True):
        yield


def words_of(outputs):
    return outputs.params["words"][outputs["token_ids"]]


class Tokens(lookup.Lookup):
    """Texts have the rows of the table `words` that their ids name; patches are the rows of `patches`."""

    outputs = lookup.Lookup.outputs | {
        "text_embedding": lambda o: jnp.sum(words_of(o), axis=1),
        "patch_embeddings": lambda o: o.params["patches"][o["image"]],
        "word_embeddings": words_of,
    }


def tables():
    rng = np.random.default_rng(3)
    words, patches = (lookup.unit(rng.normal(size=(SIZE, *n, WIDTH))) for n in ((), (P,)))
    patches[1, P - 1] = 0  # padding
    return lookup.tables(size=SIZE, width=WIDTH) | {"words": words, "patches": patches}


def local_by_hand(patches, words, scale):
    """log sum over words of exp(scale <v, w>); the weights do not depend on the parameters, see the test."""
    real = patches[np.any(patches != 0, axis=1)]
    total = 0.0
    for word in words:
        products = real @ word
        weights = (products - min(products)) / (max(products) - min(products))
        seen = weights / sum(weights) @ real
        total += np.exp(scale * seen @ word / np.sqrt(seen @ seen))
    return np.log(total)


def loss_by_hand(scores, gamma, smoothing):
    """scores: for each picture those of its own text and of its wrong ones."""
    losses = []
    for row in scores:
        if len(row) == 1:
            continue
        p, total = np.exp(row) / np.sum(np.exp(row)), 0.0
        for c in range(len(row)):
            target = smoothing / len(row) + (1 - smoothing if c == 0 else 0)
            total -= target * (1 - p[c]) ** gamma * np.log(p[c])
        losses.append(total)
    return np.mean(losses)


@pytest.mark.parametrize(("gamma", "smoothing"), [(2.0, 0.02), (0.0, 0.1)])
def test_global_scores(gamma, smoothing):
    params = tables()

    def by_hand(params, batch):
        scale, scores = np.exp(params["logit_scale"]), []
        for i in range(N):
            ids = [OWN[i, 0], *TEXTS[i, GIVEN[i], 0]]
            scores.append([scale * params["image"][i] @ params["text"][j] for j in ids])
        return loss_by_hand(scores, gamma, smoothing)

    section = dict(name="wrong_texts", gamma=gamma, label_smoothing=smoothing)
    got = lookup.differentiate(section, params, BATCH)
    lookup.check(got, by_hand, params, BATCH)
    assert not np.any(got[2]["image"][2]), "a picture without wrong texts counts"
    assert got[1]["wrong_texts/texts"] == GIVEN.sum() / N


def test_local_scores():
    """Values, and gradients of everything but the weights of patches, through which none flows."""
    params = tables()
    batch = BATCH | {"token_ids": WORDS[OWN[:, 0]], "texts": np.where(GIVEN[..., None], WORDS[TEXTS[..., 0]], 0)}
    section = dict(name="wrong_texts", scores="local")
    model = Tokens(SIZE, WIDTH)
    value, metrics, grads, _ = lookup.differentiate(section, params, batch, model=model)
    words = lambda ids: params["words"][ids[ids > 0]]

    def by_hand(scale):
        scores = [
            [local_by_hand(params["patches"][i], words(ids), scale) for ids in (batch["token_ids"][i],
             *batch["texts"][i, GIVEN[i]])] for i in range(N)
        ]  # fmt: skip
        return loss_by_hand(scores, 2.0, 0.02), np.mean([row[0] > max(row[1:]) for row in scores if len(row) > 1])

    scale = np.exp(params["logit_scale"])
    np.testing.assert_allclose([value, metrics["wrong_texts/accuracy"]], by_hand(scale), rtol=1e-10)
    slope = scale * (by_hand(scale + 1e-6)[0] - by_hand(scale - 1e-6)[0]) / 2e-6
    np.testing.assert_allclose(grads["logit_scale"], slope, rtol=1e-6)
    assert np.any(grads["words"]) and np.any(grads["patches"]) and not np.any(grads["patches"][1, P - 1])


def test_local_scores_of_one_word_and_one_patch_are_global_scores():
    """And so are their gradients: the weight of a single patch is 1."""
    params = tables() | {"patches": lookup.tables(size=SIZE, width=WIDTH)["image"][:, None]}
    params["words"] = params["text"]
    local = lookup.differentiate(dict(name="wrong_texts", scores="local"), params, BATCH, model=Tokens(SIZE, WIDTH))
    whole = lookup.differentiate(dict(name="wrong_texts"), params, BATCH)
    np.testing.assert_allclose(local[0], whole[0], rtol=1e-10)
    tangent = lambda g, x: g - np.sum(g * x, axis=-1, keepdims=True) * x  # the local score divides by the norm
    for own, one in (("words", "text"), ("patches", "image")):
        x = params[one]
        np.testing.assert_allclose(
            tangent(local[2][own].reshape(x.shape), x), tangent(whole[2][one], x), rtol=1e-10, atol=1e-14
        )


def test_with_all_other_texts_it_is_the_half_of_clip():
    """gamma 0, no smoothing: cross-entropy of images over all texts of the batch."""
    params = tables()
    half = lookup.differentiate(dict(name="wrong_texts", gamma=0.0, label_smoothing=0.0), params, ALL)
    logits = 5 * params["image"][IDS] @ params["text"][OWN[:, 0]].T
    np.testing.assert_allclose(half[0], lookup.cross_entropy(logits, np.eye(N)), rtol=1e-12)


def test_semantic_margin():
    params, margin = tables(), 0.7

    def by_hand(params, batch):
        losses = []
        for i in range(N):
            z, own = params["image"][i], params["text"][OWN[i, 0]]
            hinges = [max(0, margin + z @ params["text"][j] - z @ own) for j in TEXTS[i, GIVEN[i], 0]]
            losses += [np.mean(hinges)] if hinges else []
        return np.mean(losses)

    got = lookup.differentiate(dict(name="semantic_margin", margin=margin), params, BATCH)
    lookup.check(got, by_hand, params, BATCH)

    got = lookup.differentiate(dict(name="semantic_margin", margin=margin), params, ALL)
    cosines = params["image"][IDS] @ params["text"][OWN[:, 0]].T
    hinge = np.maximum(0, margin + cosines - np.diag(cosines)[:, None]) * (1 - np.eye(N))
    np.testing.assert_allclose(got[0], hinge.sum(1).mean() / (N - 1), rtol=1e-12)


def test_words_pass_the_head_alone():
    """The word that the pool takes is the text's embedding."""
    with jax.enable_x64(False):
        tiny = models.tiny("two_tower")
        found = tiny.apply()
        words = token_embeddings(tiny.model, tiny.params, found, "text")
        np.testing.assert_allclose(words[:, -1], found.text, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (dict(name="wrong_texts", gamma=-1.0), "gamma is -1.0, label_smoothing 0.02; expected >= 0, and 0 to below 1"),
        (dict(name="wrong_texts", scores="words"), "config.objective.scores .*`words`"),
        (
            dict(name="wrong_texts", key="wrong"),
            "`wrong_texts` needs `wrong`, which neither the batch nor .*; texts are made in data.ops",
        ),
        (dict(name="wrong_texts", scores="local"), "patches in the space of both towers need an image tower"),
        (dict(name="semantic_margin", key="image"), r"`image` is int64 \[5\]; expected token ids \[B, K, L\]"),
    ],
)
def test_mistakes_are_named(section, message):
    with pytest.raises(UserError, match=message) as error:
        lookup.differentiate(section, tables(), BATCH)
    assert "\n" not in str(error.value).split("\n---")[0]
