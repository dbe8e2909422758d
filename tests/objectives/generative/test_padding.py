"""The ids of padding and end come from the tokenizer: a caption's end is trained on, also where padding has its id."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import lookup
from vlm_jax.errors import UserError
from vlm_jax.objectives import outputs as outputs_lib
from vlm_jax.objectives.contrastive import negatives
from vlm_jax.objectives.generative import captioning
from vlm_jax.objectives.generative.rewards import policy_gradient
from vlm_jax.objectives.term import Context

IDS = jnp.array([[5, 6, 7, 7], [5, 7, 7, 7], [5, 6, 5, 7]])


class Outputs(dict):
    """Logits are 0 for each of 9 tokens."""

    def apply(self, method, hidden):
        return jnp.zeros((*hidden.shape[:-1], 9))


OUTPUTS = Outputs(next_token=(jnp.zeros((3, 4, 2)), IDS), texts=IDS[:, None])


def context(pad_id, eos_id):
    return Context(0, True, tokenizer=SimpleNamespace(pad_id=pad_id, eos_id=eos_id, spec="json:a"))


@pytest.mark.parametrize(("ids", "tokens"), [((7, 7), [3, 2, 4]), ((7, 8), [2, 1, 3]), ((0, 7), [4, 4, 4])])
def test_captions(ids, tokens):
    features = captioning(model=SimpleNamespace(outputs=())).features(OUTPUTS, context(*ids))
    assert features["tokens"].tolist() == tokens
    log_p = policy_gradient("reward", "batch").features(OUTPUTS, context(*ids))
    np.testing.assert_allclose(log_p, -np.log(9) * np.array(tokens), rtol=1e-6)


def test_without_a_tokenizer_an_option_says_it():
    features = captioning(model=SimpleNamespace(outputs=()), pad_id=7).features(OUTPUTS, Context(0, True))
    assert features["tokens"].tolist() == [2, 1, 3]
    with pytest.raises(UserError, match="has pad_id=0, tokenizer `json:a` 7; leave pad_id out"):
        captioning(model=SimpleNamespace(outputs=()), pad_id=0).features(OUTPUTS, context(7, 7))


def test_lacking_texts_among_negatives():
    model, params = lookup.Lookup(8, 2), lookup.tables(size=8, width=2, dtype=np.float32)
    outputs = outputs_lib.Outputs(model, params, {"texts": jnp.array([[[5]], [[7]], [[0]]])})
    given = negatives.texts().features(outputs, context(7, 7))["wrong"].given
    assert given.ravel().tolist() == [True, False, True]
