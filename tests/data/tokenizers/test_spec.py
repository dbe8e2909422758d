"""What every tokenizer promises, and the specs that name one."""

import pickle
import sys

import numpy as np
import pytest

from vlm_jax.data import tokenizers
from vlm_jax.errors import UserError


@pytest.fixture(scope="module")
def clip():
    return tokenizers.build("clip")


def test_long_text_keeps_eos(clip):
    ids = clip(["a " * 100, "a"], 5)
    assert ids.dtype == np.int32
    assert ids.tolist() == [[49406, 320, 320, 320, 49407], [49406, 320, 49407, 0, 0]]
    assert clip("a", 3, bos=False).tolist() == [[320, 49407, 0]]
    assert clip("a", 3, bos=False, eos=False).tolist() == [[320, 0, 0]]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("clipp", "tokenizer spec is `clipp`; expected one of: clip, emoji"),
        ("json:", "names no file"),
        ("json:/nowhere/tokenizer.json", "there is no file /nowhere/tokenizer.json"),
        ("clip:/some/file", "is packaged and takes no path"),
        ("clip?padid=0", "has no key `padid`"),
        ("clip?pad_id=zero", "pad_id is `zero`"),
        ("clip?lower=1", "lower is `1`; expected true or false"),
        (f"json:{__file__}", "is not a tokenizer.json"),
        (f"sentencepiece:{__file__}", "is not a SentencePiece model"),
        (f"wordpiece:{__file__}", "lacks [UNK]"),
        (f"wordpiece:{__file__}?cased=1", "cased is `1`; expected true or false"),
        (f"wordpiece:{sys.executable}", "is not UTF-8 text"),
    ],
)
def test_bad_specs_say_so(spec, message):
    with pytest.raises(UserError) as error:
        tokenizers.build(spec)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_pickles_as_its_spec(clip):
    data = pickle.dumps(clip)
    assert len(data) < 1000
    assert pickle.loads(data)("a diagram", 4).tolist() == [[49406, 320, 22697, 49407]]


@pytest.mark.parametrize("spec", ["clip", "emoji"])
@pytest.mark.parametrize("text", ["a photo of a cat", "it's 23 café ☕ fly-by"])
def test_decode_gives_the_text_back(spec, text):
    tokenizer = tokenizers.build(spec)
    spaced = text.replace("it's 23", "it 's 2 3").replace("fly-by", "fly - by") if spec == "clip" else text
    assert tokenizer.decode(tokenizer([text], 40)[0]) == spaced
    cat, more = tokenizer.encode("cat"), tokenizer.encode("more")
    assert tokenizer.decode([tokenizer.bos_id, *cat, tokenizer.eos_id, *more]) == "cat"
