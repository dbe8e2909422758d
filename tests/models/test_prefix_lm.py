"""A prefix language model: what each token sees, padding, caches, and generation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.compare import close
from tests.support.models import T5_SIZES, run, tiny
from vlm_jax import models
from vlm_jax.errors import UserError
from vlm_jax.models.decoder import shift_right
from vlm_jax.models.generate import Special, beam_search, log_likelihood, log_likelihoods, sample

PREFIXES = jnp.array([[3, 4, 5, 6, 7], [8, 9, 0, 0, 0]])
TARGETS = jnp.array([[5, 6, 7, 8, 9, 1], [4, 10, 1, 0, 0, 0]])


def made(scan=False):
    """(model, params, logits)."""
    lm = tiny("prefix_lm", scan)
    return lm.model, lm.params, lm.apply(PREFIXES, TARGETS)


@pytest.fixture
def lm():
    return made()


def test_a_token_sees_what_it_may(lm):
    """The prefix sees itself both ways and no target; a target sees the prefix and the targets up to its own."""
    model, params, _ = lm
    decoder = jax.jit(lambda ids, **masks: model.decoder.apply({"params": params["decoder"]}, ids, **masks).hidden)
    ids = jnp.concatenate([PREFIXES[:1], shift_right(TARGETS[:1])], axis=1)
    two_way = (jnp.arange(11) < 5)[None]

    def moved(j):
        after = decoder(ids.at[0, j].set(13), bidirectional=two_way)
        return np.abs(after - decoder(ids, bidirectional=two_way))[0].max(-1) > 1e-6

    assert moved(0).all() and moved(4).all()
    np.testing.assert_array_equal(moved(7), np.arange(11) >= 7)
    close(run(model, params, PREFIXES[:1], ids[:, 5:], method="hidden"), decoder(ids, bidirectional=two_way)[:, 5:])


def test_padding_of_prefixes_changes_nothing(lm):
    model, params, logits = lm
    close(run(model, params, PREFIXES[1:, :2], TARGETS[1:]), logits[1:])


def test_cached_steps_are_the_whole():
    """Of a scan; `test_generation` has the loop."""
    model, params, logits = made(scan=True)
    apply = lambda *args, **options: model.apply({"params": params}, *args, **options)
    context, mask = apply(PREFIXES, method="encode")
    shown, caches = shift_right(TARGETS), model.new_caches(2, 6)

    @jax.jit
    def decode(ids, context, caches, position):
        decoded = apply(ids, context, context_mask=mask, caches=caches, position=position, method="decode")
        return apply(decoded.hidden, method="logits"), decoded.caches

    for first, last in ((0, 4), (4, 6)):
        got, caches = decode(shown[:, first:last], context, caches, first)
        context = None
        close(got, logits[:, first:last])


def test_likelihoods(lm):
    model, params, logits = lm
    own = jnp.take_along_axis(jax.nn.log_softmax(logits), TARGETS[..., None], axis=2)[..., 0]
    want = jnp.sum(jnp.where(TARGETS != 0, own, 0), axis=1)
    close(log_likelihood(model, params, PREFIXES, TARGETS), want)
    close(jnp.diag(log_likelihoods(model, params, PREFIXES, TARGETS)), want)


def test_generation(lm):
    """Greedy takes what a loop without caches takes; a beam search of one is greedy; forced tokens are kept."""
    model, params, _ = lm
    special = Special(start=0, end=-1, pad=0)
    got = sample(model, params, PREFIXES, length=5, greedy=True, special=special)
    ids = np.zeros((2, 5), np.int32)
    for t in range(5):
        ids[:, t] = np.argmax(run(model, params, PREFIXES, ids)[:, t], axis=-1)
    np.testing.assert_array_equal(got.token_ids, ids)
    one = beam_search(model, params, PREFIXES, length=5, beams=1, special=special)
    np.testing.assert_array_equal(one.token_ids[:, 0], ids)
    forced = jnp.array([[11, 12], [13, 0]])
    several = beam_search(model, params, PREFIXES, forced, length=5, beams=3, length_penalty=0.0, special=special)
    assert several.token_ids[0, :, :2].tolist() == [[11, 12]] * 3 and several.token_ids[1, :, 0].tolist() == [13] * 3
    for beam in range(3):
        scores = log_likelihood(model, params, PREFIXES, several.token_ids[:, beam], pad_id=-1)
        close(several.log_likelihood[:, beam], scores)


def test_learned_positions_are_refused():
    decoder = dict(T5_SIZES, vocab_size=14, length=8, posemb="learned")
    with pytest.raises(UserError, match='a prefix LM has relative positions; set posemb="none", not "learned"'):
        models.build(dict(name="prefix_lm", decoder=decoder)).init(jax.random.key(0), PREFIXES, TARGETS)
