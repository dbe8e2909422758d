"""Masked words against a loop in fp64."""

import jax
import numpy as np
import pytest

from tests.support import lookup
from tests.support.models import TOKENS
from tests.support.towers import Towers
from vlm_jax import models, objectives
from vlm_jax.errors import UserError
from vlm_jax.objectives.generative.masked_words import hide

V, MASK = 14, 13
BATCH = {"texts": TOKENS.astype(np.int64)}


def test_masked_words():
    """Of a tower whose tokens are embeddings of the ids."""
    rng = np.random.default_rng(0)
    embedding, head = rng.normal(size=(V, 6)), {"kernel": rng.normal(size=(6, V)), "bias": rng.normal(size=V)}
    params = {"embed": {"embedding": embedding}, "text_head": {"kernel": rng.normal(size=(6, 5)), "bias": np.zeros(5)}}
    params |= {"logit_scale": np.float64(0), "logit_bias": np.float64(0), "objective": {"masked_words": {"head": head}}}
    section = dict(name="masked_words", mask_id=MASK, share=0.6, key="texts", chunk=3)
    with jax.enable_x64(True):
        hidden, seen = map(np.asarray, hide(BATCH["texts"], BATCH["texts"] != 0, None, 0.6, MASK, V))

        def by_hand(params, batch):
            losses, own = [], params["objective"]["masked_words"]["head"]
            for i, k in np.argwhere(hidden):
                logits = params["embed"]["embedding"][seen[i, k]] @ own["kernel"] + own["bias"]
                losses.append(np.log(np.sum(np.exp(logits))) - logits[TOKENS[i, k]])
            return np.mean(losses)

        got = lookup.differentiate(section, params, BATCH, model=Towers())
        lookup.check(got, by_hand, params, BATCH)
    np.testing.assert_allclose(got[1]["masked_words/perplexity"], np.exp(got[0]))


def test_what_is_hidden():
    ids, real = np.tile(np.arange(1, 11), (400, 1)), np.arange(10) < np.full((400, 1), 8)
    hidden, seen = map(np.asarray, hide(ids, real, jax.random.split(jax.random.key(1), 400), 0.25, MASK, V))
    assert not hidden[:, 8:].any() and np.array_equal(seen[~hidden], ids[~hidden])
    np.testing.assert_allclose(hidden[:, :8].mean(), 0.25, atol=0.03)
    np.testing.assert_allclose((seen == MASK)[hidden].mean(), 0.8 + 0.1 / V, atol=0.05)
    np.testing.assert_allclose((seen == ids)[hidden].mean(), 0.1 + 0.1 / V, atol=0.04)
    alone = hide(ids[7:8], real[7:8], jax.random.split(jax.random.key(1), 400)[7:8], 0.25, MASK, V)
    np.testing.assert_array_equal(alone[1][0], seen[7])  # a row's own


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mask_id=14), "config.objective.mask_id is 14; the model's ids are 0 to 13: model.text.vocab_size"),
        (dict(mask_id=3, share=0), "config.objective.share is 0; expected a share of the tokens"),
        ({}, "config.objective lacks the key `mask_id`"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    section = dict(width=8, depth=1, heads=2)
    model = models.build(dict(image=section | dict(patch=8), text=section | dict(vocab_size=V, length=8)))
    with pytest.raises(UserError, match=message):
        objectives.build(dict(name="masked_words", **options), model)
