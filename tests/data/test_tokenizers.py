"""Tokenizers against published ids, and against their own promises."""

import io
import pickle
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece

from vlm_jax.data import sources, tokenizers, train_tokenizer
from vlm_jax.errors import UserError

CORPUS = [f"{adjective} {noun}" for adjective in ("red", "tired", "sacred") for noun in ("fox", "foxes", "boxes")]


@pytest.fixture(scope="module")
def clip():
    return tokenizers.build("clip")


def test_clip_ids_are_openais(clip):
    assert clip.vocab_size == 49_408
    assert clip("a diagram", 6).tolist() == [[49406, 320, 22697, 49407, 0, 0]]
    # ids of open_clip 3.3.0's SimpleTokenizer
    assert clip.encode("It's 42 — “ﬁne”!") == [585, 568, 275, 273, 2005, 257, 3797, 10377]
    assert clip.encode("naïve  CAFÉ 日本 \U0001f44d") == [1097, 35689, 563, 15304, 39121, 19277, 361, 4201]


def test_clip_cleans_text(clip):
    assert tokenizers.clip_clean("  Fish &amp;amp;\n CHIPS\x00 ’ＡＢ’ e\u0301 ") == "fish & chips 'ab' \u00e9"
    assert clip.encode("") == []
    assert clip.encode("<|endoftext|>") != [49407], "a caption can't close itself"


def test_long_text_keeps_eos(clip):
    ids = clip(["a " * 100, "a"], 5)
    assert ids.dtype == np.int32
    assert ids.tolist() == [[49406, 320, 320, 320, 49407], [49406, 320, 49407, 0, 0]]
    assert clip("a", 3, bos=False).tolist() == [[320, 49407, 0]]
    assert clip("a", 3, bos=False, eos=False).tolist() == [[320, 0, 0]]


@pytest.fixture(scope="module")
def sentencepiece_path(tmp_path_factory):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=18, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        minloglevel=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("spm") / "spm.model"
    path.write_bytes(model.getvalue())
    return path


def test_sentencepiece(sentencepiece_path):
    tokenizer = tokenizers.build(f"sentencepiece:{sentencepiece_path}")
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (18, 0, None, 1)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_path))
    ids = reference.encode("tired fox")
    assert tokenizer.encode("tired fox") == ids
    assert tokenizer("tired fox", 16).tolist() == [[*ids, 1] + [0] * (15 - len(ids))]


def test_options_follow_the_spec(sentencepiece_path):
    siglip = tokenizers.build(f"sentencepiece:{sentencepiece_path}?pad_id=1&lower=true")
    plain = tokenizers.build(f"sentencepiece:{sentencepiece_path}")
    ids = plain.encode("red fox")
    assert siglip.encode("RED Fox") == ids != plain.encode("RED Fox")
    assert siglip("RED Fox", 12).tolist() == [ids + [1] * (12 - len(ids))]


def test_wordpiece(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "fox", "##es", "run", "##ning", "!"]))
    tokenizer = tokenizers.build(f"wordpiece:{path}")
    assert tokenizer("The FOXES running! zebra", 10).tolist() == [[2, 4, 5, 6, 7, 8, 9, 1, 3, 0]]
    assert tokenizer("the fox", 4, eos=False).tolist() == [[2, 4, 5, 0]]


def test_trained_tokenizer_encodes_any_text(tmp_path):
    path = tmp_path / "deep" / "tokenizer.json"
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(f'{{"name": {{"en": "{text}"}}, "tags": ["red", "fox"]}}\n' for text in CORPUS))
    command = [f"--uri=jsonl:{source}", "--fields=name/en,tags", "--vocab_size=300", f"--out={path}"]
    run = subprocess.run(
        [sys.executable, "-m", "vlm_jax.data.train_tokenizer", *command], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    tokenizer = tokenizers.build(f"json:{path}")
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert 259 < tokenizer.vocab_size <= 300
    assert len(tokenizer.encode("Red")) == 1, "a frequent word is one token"
    assert tokenizer.encode("RED fox") == tokenizer.encode("red fox")
    assert tokenizer.encode("\u6f22 \U0001f98a"), "unseen characters become bytes"
    assert path.read_text() == tokenizers.train([*CORPUS, "red", "fox"], 300), "the same corpus gives the same file"


def test_emoji_knows_the_training_words_only():
    tokenizer = tokenizers.build("emoji")
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (2985, 0, 1, 2)
    assert tokenizer("Red APPLE", 4, bos=False, eos=False).tolist() == [[524, 1814, 0, 0]]
    assert len(tokenizer.encode("hippopotamus")) > 3, "a held-out concept's own word is in pieces"


def test_corpus_names_the_record_without_the_field(tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"name": {"en": "red fox"}, "tags": ["fox"]}\n{"name": {"de": "Fuchs"}}\n')
    source = sources.open_source(f"jsonl:{tmp_path}/texts.jsonl")
    with pytest.raises(UserError, match=r"record texts.jsonl:2 has no field `name/en` \(there: de\)"):
        train_tokenizer.corpus(source, ["name/en"])


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
