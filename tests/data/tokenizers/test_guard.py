"""Hostile tokenizers: refused in time, and without filling memory."""

import json
import shutil
import time

import pytest

from vlm_jax.data import tokenizers
from vlm_jax.data.source import BadExample
from vlm_jax.data.tokenizers import guard, library
from vlm_jax.errors import UserError

SPLIT = dict(type="Split", behavior="Isolated", invert=False)
BIG = dict(type="Replace", pattern={"String": "a"}, content="aa")


@pytest.fixture
def changed(tmp_path):
    """Writes the packaged tokenizer.json with other parts; returns its spec."""

    def write(**parts):
        (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(library.EMOJI.read_text()) | parts))
        return f"json:{tmp_path}/tokenizer.json"

    return write


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (dict(normalizer=dict(type="Sequence", normalizers=[BIG] * 60)), "makes one character up to"),
        (dict(normalizer=dict(type="Replace", pattern={"Regex": ""}, content="a" * 2000)), "makes one character up to"),
        (dict(normalizer=dict(type="Prepend", prepend="a" * 10**5)), "makes one character up to 100,000"),
        (dict(decoder=dict(type="Sequence", decoders=[BIG] * 60)), "makes one character up to"),
        (dict(pre_tokenizer=SPLIT | dict(pattern={"Regex": "(a+)+$"})), r"may run for hours, '\(a\+\)\+\$'"),
        (dict(pre_tokenizer=SPLIT | dict(pattern={"Regex": "a" * 20_000})), "may run for hours"),
        (dict(model=dict(type="WordPiece", vocab={"a": 0}, max_input_chars_per_word=10**6)), "1,000,000; expected"),
        (dict(normalizer=dict(type="Precompiled", precompiled_charsmap="AAAAAAA=")), "cannot read texts|is not a tok"),
        (dict(pre_tokenizer=SPLIT | dict(pattern={"Regex": "("})), "is not a tokenizer.json"),
        (dict(model=3), "is not a tokenizer.json"),
    ],
)
def test_a_hostile_file_is_refused(parts, message, changed):
    began = time.monotonic()
    with pytest.raises(UserError, match=message):
        tokenizers.build(changed(**parts))
    assert time.monotonic() - began < 5


def test_a_panic_at_a_text_is_a_bad_example(changed):
    """The regex library gives up after 10 million steps, by a panic, which is no Exception."""
    tokenizer = tokenizers.build(changed(pre_tokenizer=SPLIT | dict(pattern={"Regex": "a*a*a*a*a*$"})))
    assert tokenizer.encode("red fox")
    with pytest.raises(BadExample, match="cannot read 'aaa"):
        tokenizer.encode("a" * 300 + "b")


@pytest.mark.parametrize("regex", ["(a+)+", "(a|b)*c", "((x?)y*){2,}", r"(?:\s*,)*", "(.*,){9}$", "([ab]+|c)+"])
def test_regexes_that_repeat_repeats(regex):
    assert guard.backtracks(regex)


@pytest.mark.parametrize(
    "regex",
    [
        r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
        r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{M}]*[\p{Ll}\p{M}]+(?i:'s|'t|'re)?|\p{N}{1,3}|\s+",
        r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))",
        r"[(*+)]+|\(a+\)+",
    ],
)
def test_regexes_of_released_tokenizers_pass(regex):
    assert not guard.backtracks(regex)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("emoji?pad_id=99999999999", "expected a whole number"),
        ("emoji?pad_id=4294967295", "ids; expected"),
        ("sentencepiece:{file}?extra_ids=999999999", "extra_ids is 999999999|is not a SentencePiece model"),
        ("json:/dev/zero", "there is no file"),
    ],
)
def test_hostile_specs(spec, message, tmp_path):
    shutil.copy(library.EMOJI, tmp_path / "t.json")
    with pytest.raises(UserError, match=message):
        tokenizers.build(spec.format(file=tmp_path / "t.json"))
