"""Decoding against brute force, on a decoder with five tokens."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.models import initial, run, with_opinions
from vlm_jax import models
from vlm_jax.errors import UserError
from vlm_jax.models.generate import Rules, Special, beam_search, sample

VOCAB, LENGTH, BATCH = 5, 4, 3
SPECIAL = Special(start=0, end=1, pad=0)


@pytest.fixture(scope="module", params=[False, True], ids=["loop", "scan"])
def captioner(request):
    """(model, params, images), with logits that are far from uniform."""
    sizes = dict(width=32, depth=2, heads=2, mlp_dim=64, scan=request.param)
    decoder = dict(**sizes, vocab_size=VOCAB, length=8, mask_token=True)
    model = models.build(dict(name="captioner", image=dict(**sizes, patch=8), decoder=decoder))
    images = jax.random.normal(jax.random.key(0), (BATCH, 16, 16, 3))
    return model, with_opinions(initial(model, images, jnp.zeros((BATCH, LENGTH), jnp.int32)), 0.3), images


in_a_scan = pytest.mark.parametrize("captioner", [True], ids=["scan"], indirect=True)  # rules know only logits


@pytest.fixture(scope="module")
def texts(captioner):
    """Every text that can come, int [n, L], and its log-likelihood [B, n], computed without caches."""
    model, params, images = captioner
    every = [ids for ids in itertools.product(range(VOCAB), repeat=LENGTH) if not _after_end(ids)]
    every = np.array(every)
    forward = jax.jit(lambda images, ids: jax.nn.log_softmax(run(model, params, images, ids)))
    scores = []
    for image in images:
        log_p = forward(jnp.broadcast_to(image, (len(every), *image.shape)), every)
        own = np.take_along_axis(np.asarray(log_p, np.float64), every[..., None], axis=2)[..., 0]
        ended = np.cumsum(every == SPECIAL.end, axis=1) - (every == SPECIAL.end)
        scores.append(np.where(ended > 0, 0, own).sum(1))
    return every, np.array(scores)


def _after_end(ids):
    """Whether something other than padding follows the end."""
    return SPECIAL.end in ids and any(ids[ids.index(SPECIAL.end) + 1 :])


def lengths(ids):
    ended = ids == SPECIAL.end
    return np.where(ended.any(1), ended.argmax(1) + 1, ids.shape[1])


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_beam_search_is_exhaustive_where_it_can_be(captioner, texts, alpha):
    model, params, images = captioner
    every, scores = texts
    beams = 4**3  # as many as there are unfinished texts of three tokens
    got = beam_search(model, params, images, length=LENGTH, beams=beams, length_penalty=alpha, special=SPECIAL)
    normed = scores / ((5 + lengths(every)) / 6) ** alpha
    for b in range(BATCH):
        order = np.argsort(-normed[b])[:10]
        np.testing.assert_array_equal(got.token_ids[b, :10], every[order])
        np.testing.assert_allclose(got.log_likelihood[b, :10], scores[b][order], rtol=1e-5, atol=1e-5)


def test_one_beam_is_greedy(captioner):
    model, params, images = captioner
    greedy = sample(model, params, images, length=LENGTH, greedy=True, special=SPECIAL)
    beam = beam_search(model, params, images, length=LENGTH, beams=1, special=SPECIAL)
    np.testing.assert_array_equal(beam.token_ids[:, 0], greedy.token_ids)
    np.testing.assert_allclose(beam.log_likelihood[:, 0], greedy.log_likelihood, rtol=1e-6)


def test_greedy_takes_the_likeliest_each_time(captioner, texts):
    """The same tokens as a loop without caches, and their log-likelihood."""
    model, params, images = captioner
    got = sample(model, params, images, length=LENGTH, greedy=True, special=SPECIAL)
    ids = np.zeros((BATCH, LENGTH), np.int32)
    forward = lambda ids: run(model, params, images, ids)
    for t in range(LENGTH):
        ids[:, t] = np.argmax(forward(ids)[:, t], axis=-1)
    for b in range(BATCH):
        ids[b, lengths(ids)[b] :] = 0
    np.testing.assert_array_equal(got.token_ids, ids)
    every, scores = texts
    for b in range(BATCH):
        row = np.flatnonzero((every == ids[b]).all(1))[0]
        np.testing.assert_allclose(got.log_likelihood[b], scores[b, row], rtol=1e-5, atol=1e-5)


@in_a_scan
@pytest.mark.parametrize(
    "rules", [Rules(), Rules(temperature=0.5), Rules(top_k=2), Rules(top_p=0.6), Rules(temperature=2.0, top_p=0.8)]
)
def test_samples_have_the_distribution(captioner, texts, rules):
    """Frequencies of all texts of two tokens, among 20,000 draws, against the product of the steps' probabilities."""
    model, params, images = captioner
    n, length = 20_000, 2
    got = sample(
        model, params, jnp.broadcast_to(images[:1], (n, *images.shape[1:])), jax.random.key(3),
        length=length, special=SPECIAL, rules=rules,
    )  # fmt: skip
    want = np.zeros((VOCAB, VOCAB))
    first, after = _steps(model, params, images[:1], rules)
    for a in range(VOCAB):
        want[a] = first[a] * (after[a] if a != SPECIAL.end else np.eye(VOCAB)[SPECIAL.pad])
    np.testing.assert_allclose(want.sum(), 1, rtol=1e-5)
    counts = np.zeros((VOCAB, VOCAB))
    np.add.at(counts, tuple(np.asarray(got.token_ids).T), 1)
    sd = np.sqrt(n * want * (1 - want))
    assert np.all(np.abs(counts - n * want) <= 5 * sd + 2)
    assert not counts[want == 0].any()


def _steps(model, params, image, rules):
    """p(first) [V] and p(second | first) [V, V], by the rules' definitions."""
    texts = np.array([[a, 0] for a in range(VOCAB)])
    images = jnp.broadcast_to(image, (VOCAB, *image.shape[1:]))
    logits = np.asarray(run(model, params, images, texts), np.float64)

    def probabilities(logits):
        p = np.exp(logits / rules.temperature)
        p /= p.sum()
        order = np.argsort(-p)
        keep = order[: rules.top_k or VOCAB]
        if rules.top_p:
            keep = order[: np.searchsorted(np.cumsum(p[order]), rules.top_p) + 1]
        return np.where(np.isin(np.arange(VOCAB), keep), p, 0) / p[keep].sum()

    return probabilities(logits[0, 0]), np.array([probabilities(row) for row in logits[:, 1]])


@pytest.mark.parametrize("beams", [None, 4**3])
def test_prefixes_of_different_lengths_are_kept(captioner, texts, beams):
    """And what follows is what brute force says, given the prefix."""
    model, params, images = captioner
    prefix = np.array([[2, 3], [4, 0], [0, 0]], np.int32)
    options = dict(length=LENGTH, special=SPECIAL)
    if beams:
        got = beam_search(model, params, images, prefix, beams=beams, length_penalty=0.0, **options)
        ids = np.asarray(got.token_ids[:, 0])
        every, scores = texts
        for b, start in enumerate(prefix):
            start = start[start > 0]
            fits = (every[:, : len(start)] == start).all(1)
            np.testing.assert_array_equal(ids[b], every[fits][np.argmax(scores[b][fits])])
    else:
        ids = np.asarray(sample(model, params, images, None, prefix, greedy=True, **options).token_ids)
        np.testing.assert_array_equal(ids[0, :2], [2, 3])
        np.testing.assert_array_equal(ids[1, :1], [4])
        free = sample(model, params, images, greedy=True, **options)
        np.testing.assert_array_equal(ids[2], free.token_ids[2])


@in_a_scan
@pytest.mark.parametrize("n", [1, 2])
def test_no_ngram_repeats(captioner, n):
    model, params, images = captioner
    special = Special(start=VOCAB, end=-1)  # never ends; the start, an earlier token too, is no token of texts
    got = sample(
        model, params, jnp.repeat(images, 20, axis=0), jax.random.key(0), length=5, special=special,
        rules=Rules(no_repeat_ngram=n),
    )  # fmt: skip
    for ids in np.asarray(got.token_ids):
        grams = list(zip(*(ids[i:] for i in range(n)), strict=False))
        assert len(set(grams)) == len(grams)


@in_a_scan
def test_repetition_penalty(captioner):
    """With a huge one greedy never takes a token twice while another is left."""
    model, params, images = captioner
    rules = Rules(repetition_penalty=1e6)
    got = sample(model, params, images, length=5, greedy=True, special=Special(VOCAB, -1), rules=rules)
    start = dataclasses.replace(model.decoder, start_id=VOCAB)
    shifted = np.asarray(run(model.clone(decoder=start), params, images, got.token_ids))
    for b, ids in enumerate(np.asarray(got.token_ids)):
        for t, token in enumerate(ids):
            fresh = [v for v in range(VOCAB) if v not in ids[:t]]
            best = max(fresh, key=lambda v: shifted[b, t, v])
            assert token == best or shifted[b, t, best] < 0


@in_a_scan
def test_beams_of_the_power_form_and_repetition(captioner, texts):
    """Exhaustive: log p / tokens**a of what no prefix forces; the penalty changes log p, not normalised again."""
    model, params, images = captioner
    every, scores = texts
    options = dict(length=LENGTH, beams=4**3, special=SPECIAL, length_form="power", length_penalty=-1.5)
    prefix = np.array([[2], [0], [0]], np.int32)
    got = beam_search(model, params, images, prefix, **options)
    log_p = jax.nn.log_softmax(run(model, params, images, np.zeros((BATCH, LENGTH), int)))
    for b, start in enumerate(prefix):
        fits = (every[:, :1] == start).all(1) | (start == 0).all()
        normed = (scores[b] - log_p[b, 0, start] * (start > 0)) / np.maximum(
            lengths(every) - (start > 0).sum(), 1
        ) ** -1.5
        np.testing.assert_array_equal(got.token_ids[b, 0], every[np.argmax(np.where(fits, normed, -np.inf))])
    ids = np.array([[2, 2, 3, 1]] * BATCH)
    log_p = jax.nn.log_softmax(run(model, params, images, ids))
    own = np.take_along_axis(np.asarray(log_p), ids[..., None], axis=2)[..., 0]
    got = beam_search(model, params, images, ids, rules=Rules(repetition_penalty=2.0), **options)
    np.testing.assert_array_equal(got.token_ids[:, 0], ids)
    np.testing.assert_allclose(got.log_likelihood[:, 0], own @ [1, 2, 1, 1], rtol=1e-5)


@in_a_scan
def test_the_loop_ends_when_all_texts_have(captioner):
    """A head that always ends: one step, whatever the length."""
    model, params, images = captioner
    params = params | {"head": dict(kernel=jnp.zeros((32, VOCAB)), bias=jnp.array([0.0, 50, 0, 0, 0]))}
    got = sample(model, params, images, length=8, greedy=True, special=SPECIAL)
    np.testing.assert_array_equal(got.token_ids, [[1, 0, 0, 0, 0, 0, 0, 0]] * BATCH)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (
            dict(temperature=0.0),
            "temperature should be a number above 0; got 0.0; for the likeliest tokens, use greedy",
        ),
        (dict(temperature=-1.0), "a number above 0"),
        (dict(temperature=float("nan")), "got nan"),
        (dict(temperature="hot"), "got 'hot'"),
        (dict(top_p=0.0), "top_p should be above 0 and at most 1"),
        (dict(top_p=1.5), "at most 1"),
        (dict(top_k=0), "top_k should be a whole number, at least 1, or None; got 0"),
        (dict(top_k=2.0), "whole number"),
        (dict(top_k=True), "got True"),
        (dict(no_repeat_ngram=-1), "at least 0"),
        (dict(encoder_no_repeat_ngram=1.0), "whole number"),
        (dict(encoder_no_repeat_ngram=2), "is for models that read texts"),
        (dict(repetition_penalty=0), "repetition_penalty should be a number above 0"),
        (dict(repetition_penalty=float("inf")), "got inf"),
    ],
)
@in_a_scan
def test_options_out_of_their_range_are_named(captioner, wrong, expected):
    with pytest.raises(UserError, match=expected):
        sample(*captioner, jax.random.key(0), length=LENGTH, rules=Rules(**wrong))


@pytest.mark.parametrize(
    "wrong",
    [
        dict(beams=0),
        dict(length_penalty=-2.0),
        dict(length=0),
        dict(beams=1.5),
        dict(length_penalty=float("nan"), length_form="power"),
        dict(early_stopping="always"),
        dict(early_stopping=1),
    ],
)
@in_a_scan
def test_options_of_beams_are_named(captioner, wrong):
    with pytest.raises(UserError, match=f"{next(iter(wrong))} should be"):
        beam_search(*captioner, **{"length": LENGTH, **wrong})
