"""open_clip's `tokenizer_kwargs`: cleaning before the tokenizer, and the separator that becomes 0."""

import json

import numpy as np
import pytest

from vlm_jax.data import ops, tokenizers
from vlm_jax.errors import UserError
from vlm_jax.zoo import open_clip_tokenizers

NAMED = dict(hf_tokenizer_name="some/name")


@pytest.fixture
def folder(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "&", "amp", ";", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return tmp_path


def ids(found, text):
    return ops.parse(found[1], tokenizers.build(found[0]))({"text": text}, np.random.default_rng(0))[
        "token_ids"
    ].tolist()


def test_cleaning(folder):
    """open_clip unescapes every text; "canonicalize" drops punctuation, too."""
    plain = open_clip_tokenizers.read(folder, 6, NAMED)
    assert plain[1] == "clean | tokenize(6)"
    assert ids(plain, "a &amp;  cat") == ids(plain, "a & cat") == [2, 5, 7, 6, 3, 0]
    canonical = open_clip_tokenizers.read(folder, 6, NAMED | dict(tokenizer_kwargs=dict(clean="canonicalize")))
    assert canonical[1] == "clean | canonicalize | tokenize(6)"
    assert ids(canonical, "A. cat") == ids(canonical, "a_cat") == [2, 5, 6, 3, 0, 0]


def test_a_separator_that_becomes_0_takes_its_room(folder):
    stripped = open_clip_tokenizers.read(folder, 5, NAMED | dict(tokenizer_kwargs=dict(strip_sep_token=True)))
    assert ids(stripped, "a cat") == [2, 5, 6, 0, 0]
    assert ids(stripped, "a cat a cat") == [2, 5, 6, 5, 0]  # cut to the length first, as in `HFTokenizer`


def test_clips_own_tokenizer():
    assert open_clip_tokenizers.read(None, 77, {}) == ("clip", "tokenize(77)")
    canonical = dict(tokenizer_kwargs=dict(clean="canonicalize"))
    assert open_clip_tokenizers.read(None, 77, canonical) == ("clip", "clean | canonicalize | tokenize(77)")
    with pytest.raises(UserError, match="CLIP's own tokenizer here always lower-cases"):
        open_clip_tokenizers.read(None, 77, dict(tokenizer_kwargs=dict(clean="whitespace")))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(language="en"), "text_cfg.tokenizer_kwargs has language 'en', which is not known here"),
        (dict(clean="strange"), "text_cfg.tokenizer_kwargs.clean is `strange`"),
    ],
)
def test_other_settings_are_refused(kwargs, message, folder):
    with pytest.raises(UserError, match=message):
        open_clip_tokenizers.read(folder, 6, NAMED | dict(tokenizer_kwargs=kwargs))


def test_no_separator_to_strip(folder):
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(UserError, match="ends no text with a separator"):
        open_clip_tokenizers.read(folder, 6, NAMED | dict(tokenizer_kwargs=dict(strip_sep_token=True)))


def test_the_cleaning_that_an_export_names():
    for string, clean in (
        ("tokenize(8)", "whitespace"),
        ("clean | lower | tokenize(8)", "lower"),
        ("clean | canonicalize | tokenize(8)", "canonicalize"),
        ("canonicalize(underscore='drop') | tokenize(8)", "whitespace"),
    ):
        assert open_clip_tokenizers.cleaning(string, tokenizers.build("emoji")) == clean
