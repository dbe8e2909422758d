"""Denoisers' inputs and targets, written and read."""

import numpy as np
import pytest

from vlm_jax.data import span_texts, spans, tokenizers
from vlm_jax.errors import UserError

VOCAB = 3088


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.build("emoji")


@pytest.mark.parametrize("number", range(len(spans.UL2)))
def test_what_a_denoiser_makes_is_read_as_it_was_written(tokenizer, number):
    denoiser, _ = spans.UL2[number]
    mode = [spans.mode_ids(VOCAB)[denoiser.mode]]
    room = dict(inputs_length=48, targets_length=48, vocab_size=VOCAB, eos_id=tokenizer.eos_id)
    token_ids = tokenizer.encode("animal, face, monkey, banana, tree, tail, forest")
    inputs, targets = spans.corrupt(token_ids, denoiser, np.random.default_rng(0), mode=mode, **room)
    assert span_texts.write(inputs, tokenizer, VOCAB).startswith(denoiser.mode)
    for ids in (inputs, targets):
        text = span_texts.write(ids, tokenizer, VOCAB)
        again = span_texts.read(text, tokenizer, VOCAB, 48)
        assert span_texts.write(again, tokenizer, VOCAB) == text
        kept = lambda values: [i for i in values if i >= VOCAB - spans.SENTINELS - len(spans.MODES)]
        assert kept(again) == kept(ids)


def test_ids(tokenizer):
    ids = span_texts.read("[NLU] cat <0> tail", tokenizer, VOCAB, 12)
    cat, tail = (tokenizer.encode(word) for word in ("cat", "tail"))
    expected = [spans.mode_ids(VOCAB)["[NLU]"], *cat, VOCAB - 1, *tail, tokenizer.eos_id]
    np.testing.assert_array_equal(ids, expected + [0] * (12 - len(expected)))
    assert ids.dtype == np.int32
    assert span_texts.write(ids, tokenizer, VOCAB) == "[NLU] cat <0> tail"


def test_errors(tokenizer):
    with pytest.raises(UserError, match=r"no sentinel <100>, they end with <99>"):
        span_texts.read("cat <100>", tokenizer, VOCAB, 12)
    with pytest.raises(UserError, match=r"there is room for 2 and EOS"):
        span_texts.read("<0> cat <1> tail", tokenizer, VOCAB, 3)
