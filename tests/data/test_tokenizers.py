"""Tokenizers against published ids, and against their own promises."""

import io
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
import tokenizers as hf

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

    lines = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "\u2028", "Fox"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    cased = tokenizers.build(f"wordpiece:{path}?cased=true")
    assert cased.vocab_size == 7, "an odd line separator is a piece"
    assert cased("the Fox", 4).tolist() == [[2, 4, 6, 3]]
    assert tokenizers.build(f"wordpiece:{path}")("the Fox", 4).tolist() == [[2, 4, 1, 3]]


def test_bpe_reads_clips_vocabulary_and_merges(tmp_path, clip):
    """A part of CLIP's: frequent words have its ids."""
    vocab, merges = tokenizers.clip_vocabulary()
    merges = merges[:2000]
    pieces = [*list(vocab)[:512], *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    with pytest.raises(UserError, match=r"there is no file .*merges.txt, which belongs to"):
        tokenizers.build(f"bpe:{tmp_path}/vocab.json")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
    tokenizer = tokenizers.build(f"bpe:{tmp_path}/vocab.json")
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (2514, 2513, 2512, 2513)
    text = "A photo of THE man, with  it's 2 days!"
    ids = clip.encode(text)
    assert [i for i in ids if i >= 2512] == [], "made by the first two thousand merges"
    assert tokenizer.encode(text) == ids
    assert tokenizer("the", 5).tolist() == [[2512, *clip.encode("the"), 2513, 2513, 2513]]
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(UserError, match="are not CLIP's byte pairs"):
        tokenizers.build(f"bpe:{tmp_path}/vocab.json")


@pytest.mark.parametrize(
    ("single", "bos", "eos"),
    [(["[B]", "$A", "[E]"], 1, 2), (["$A", "[E]"], None, 2), (["[B]", "$A"], 1, None), (["$A"], None, None)],
)
def test_json_honours_its_post_processor(single, bos, eos, tmp_path):
    """Over the usual names (<s>, </s>), which count without one; so does its padding, which is not done twice."""
    vocab = {"<pad>": 0, "[B]": 1, "[E]": 2, "<s>": 3, "</s>": 4, "red": 5, "fox": 6, "?": 7, "a": 8}
    model = hf.Tokenizer(hf.models.WordLevel(vocab, unk_token="?"))
    model.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    model.save(str(tmp_path / "plain.json"))
    model.post_processor = hf.processors.TemplateProcessing(single=single, special_tokens=[("[B]", 1), ("[E]", 2)])
    model.enable_padding(length=12, pad_id=7, pad_token="?")
    model.enable_truncation(4)
    model.save(str(tmp_path / "wrapped.json"))
    plain, wrapped = (tokenizers.build(f"json:{tmp_path}/{name}.json") for name in ("plain", "wrapped"))
    assert (plain.pad_id, plain.bos_id, plain.eos_id) == (0, 3, 4)
    assert (wrapped.pad_id, wrapped.bos_id, wrapped.eos_id) == (7, bos, eos)
    expected = [i for i in (bos, 5, 6, 5, 6, eos) if i is not None]
    assert wrapped("red fox red fox", 6).tolist() == [expected + [7] * (6 - len(expected))]


def test_json_with_two_specials_on_a_side_is_refused(tmp_path):
    model = hf.Tokenizer(hf.models.WordLevel({"a": 0, "[B]": 1}, unk_token="a"))
    model.post_processor = hf.processors.TemplateProcessing(single=["[B]", "[B]", "$A"], special_tokens=[("[B]", 1)])
    model.save(str(tmp_path / "two.json"))
    with pytest.raises(UserError, match=r"puts the ids \[1, 1\] and \[\] around a text"):
        tokenizers.build(f"json:{tmp_path}/two.json")


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
