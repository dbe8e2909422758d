"""Specs and ops from the tokenizer files of a Transformers folder, and back (against AutoTokenizer: tests/parity)."""

import io
import json

import numpy as np
import pytest
import sentencepiece
import tokenizers as hf

from vlm_jax.data import ops, tokenizers
from vlm_jax.data.tokenizers import clip
from vlm_jax.errors import UserError
from vlm_jax.zoo import recognize, tokenizer_files

TEXTS = ["the red fox", "The foxes, running!", "two red boxes", "zebra"]
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def write(folder, **files):
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")


def encode(spec, string, texts=TEXTS):
    pipeline = ops.parse(string, tokenizers.build(spec))
    return np.stack([pipeline({"text": text}, None)["token_ids"] for text in texts])


def settings_of(folder):
    return json.loads((folder / "tokenizer_config.json").read_text())


@pytest.fixture
def bert(tmp_path):
    """A folder with a vocab.txt: ids are line numbers."""
    write(
        tmp_path,
        vocab__txt="\n".join([*SPECIALS, "the", "red", "fox", "##es", "box", "run", "##ning", ",", "!", "The"]),
    )
    return tmp_path


@pytest.fixture
def siglip(tmp_path):
    """A folder with a SentencePiece model: pad 0, eos 1, unk 2, no bos."""
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 4), model_writer=stream, vocab_size=30, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    (tmp_path / "spiece.model").write_bytes(stream.getvalue())
    write(tmp_path, tokenizer_config__json={"tokenizer_class": "SiglipTokenizer", "pad_token": "</s>"})
    return tmp_path


def clip_json(merges=1000):
    """Transformers' CLIP tokenizer of a part of the vocabulary."""
    vocab, pairs = clip.vocabulary()
    pieces = [*list(vocab)[: 512 + merges], *clip.SPECIALS]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return clip.from_pairs(vocab, pairs[:merges], len(vocab) - 2, len(vocab) - 1)


def test_clip_folder(tmp_path):
    clip_json().save(str(tmp_path / "tokenizer.json"))
    token = {"content": "<|endoftext|>", "lstrip": False}
    write(tmp_path, tokenizer_config__json={"tokenizer_class": "CLIPTokenizer", "pad_token": token})
    spec, string = tokenizer_files.from_transformers(tmp_path, 8, "clip")
    assert (spec, string) == (f"json:{tmp_path}/tokenizer.json", "tokenize(8)")
    got = encode(spec, string, ["the man"])[0].tolist()
    assert got == [1512, *tokenizers.build("clip").encode("the man"), 1513, 1513, 1513, 1513, 1513]
    write(tmp_path, special_tokens_map__json={"pad_token": "!"}, tokenizer_config__json={})
    assert tokenizer_files.from_transformers(tmp_path, 8, "clip_text_model")[0].endswith("tokenizer.json?pad_id=0")


def test_bert_folder(bert):
    spec, string = tokenizer_files.from_transformers(bert, 8, "bert")
    assert (spec, string) == (f"wordpiece:{bert}/vocab.txt", "tokenize(8)")
    expected = [[2, 5, 6, 7, 3, 0, 0, 0], [2, 5, 7, 8, 12, 10, 11, 3]]
    assert encode(spec, string)[:2].tolist() == expected
    write(bert, tokenizer_config__json={"do_lower_case": False, "tokenizer_class": "BertTokenizerFast"})
    spec, _ = tokenizer_files.from_transformers(bert, 8, "")
    assert spec.endswith("vocab.txt?cased=true")
    assert encode(spec, string)[1, :3].tolist() == [2, 14, 7]
    write(bert, tokenizer_config__json={"strip_accents": False})
    with pytest.raises(UserError, match="has strip_accents False, the tokenizer None; pass tokenizer="):
        tokenizer_files.from_transformers(bert, 8, "bert")


def test_sentence_transformers_folder(bert):
    """Its transformer may lie in a subfolder, and it may lower the text itself."""
    inner = bert / "0_Transformer"
    inner.mkdir()
    (bert / "vocab.txt").rename(inner / "vocab.txt")
    write(bert, modules__json=[{"idx": 0, "path": "0_Transformer"}, {"idx": 1, "path": "1_Pooling"}])
    write(inner, sentence_bert_config__json={"max_seq_length": 256, "do_lower_case": True})
    spec, string = tokenizer_files.from_transformers(bert, 256, "bert")
    assert (spec, string) == (f"wordpiece:{inner}/vocab.txt", "lower | tokenize(256)")


def test_siglip_folder(siglip):
    """SentencePiece counts over a tokenizer.json beside it, as in Transformers; 1 both ends and pads."""
    (siglip / "tokenizer.json").write_text("{}")
    spec, string = tokenizer_files.from_transformers(siglip, 12, "siglip")
    canonical = "canonicalize(underscore='drop') | tokenize(12, bos=False)"
    assert (spec, string) == (f"sentencepiece:{siglip}/spiece.model?pad_id=1", canonical)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(siglip / "spiece.model"))
    ids = [*reference.encode("the foxes running")[:11], 1]
    assert encode(spec, string)[1].tolist() == ids + [1] * (12 - len(ids))
    write(siglip, tokenizer_config__json={"tokenizer_class": "T5Tokenizer"})
    (siglip / "tokenizer.json").unlink()
    found = tokenizer_files.from_transformers(siglip, 12, "t5")
    assert found == (f"sentencepiece:{siglip}/spiece.model?extra_ids=100", "tokenize(12, bos=False)")


def test_siglip2_folder(tmp_path):
    """Gemma's file adds BOS; SigLIP 2 has none, but EOS."""
    vocab = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "red": 4, "fox": 5, "a": 6}
    model = hf.Tokenizer(hf.models.WordLevel(vocab, unk_token="<unk>"))
    model.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    model.post_processor = hf.processors.TemplateProcessing(single=["<bos>", "$A"], special_tokens=[("<bos>", 2)])
    model.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "GemmaTokenizer", "padding_side": "right", "eos_token": "<eos>"}
    write(tmp_path, tokenizer_config__json=config)
    for model_type in ("siglip", "siglip2"):
        spec, string = tokenizer_files.from_transformers(tmp_path, 5, model_type)
        assert string == "lower | tokenize(5, bos=False)"
        assert encode(spec, string, ["RED Fox", "red red red red red"]).tolist() == [[4, 5, 1, 0, 0], [4, 4, 4, 4, 1]]
    spec, string = tokenizer_files.from_transformers(tmp_path, 5, "gemma")
    assert string == "tokenize(5, eos=False)"
    assert encode(spec, string, ["red fox"]).tolist() == [[2, 4, 5, 0, 0]]
    write(tmp_path, tokenizer_config__json=config | {"add_bos_token": False, "add_eos_token": True})
    assert tokenizer_files.from_transformers(tmp_path, 5, "gemma")[1] == "tokenize(5, bos=False)"


def test_what_is_not_understood_says_so(tmp_path, siglip):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError) as error:
        tokenizer_files.from_transformers(empty, 8, "clip")
    expected = "looked for tokenizer.json, spiece.model, tokenizer.model, vocab.json, vocab.txt: pass tokenizer="
    assert expected in str(error.value) and "\n" not in str(error.value)
    for config, message in (
        ({"tokenizer_class": "XLMRobertaTokenizer"}, "spiece.model is of class XLMRobertaTokenizer; expected Siglip"),
        ({"tokenizer_class": "T5Tokenizer", "padding_side": "left"}, "pads on the left"),
        ({"tokenizer_class": "T5Tokenizer", "keep_accents": True}, "has keep_accents True, which is not known here"),
        (
            {"tokenizer_class": "T5Tokenizer", "truncation_side": "left"},
            "only 'right' is supported, or pass tokenizer=",
        ),
        ({"tokenizer_class": "T5Tokenizer", "sp_model_kwargs": {"enable_sampling": True}}, r"only \{\} is supported"),
        ({"tokenizer_class": "T5Tokenizer", "split_special_tokens": True}, "only False is supported"),
        ("[", "tokenizer_config.json is not JSON"),
        ("[]", "tokenizer_config.json holds a list; expected a dict"),
    ):
        write(siglip, tokenizer_config__json=config)
        with pytest.raises(UserError, match=message):
            tokenizer_files.from_transformers(siglip, 8, "")


def test_settings_that_change_nothing_are_none(siglip):
    """As openai/clip-vit-base-patch32, google/siglip-* and Transformers 5 write them."""
    write(siglip, tokenizer_config__json={"tokenizer_class": "SiglipTokenizer"})
    plain = tokenizer_files.from_transformers(siglip, 8, "siglip")
    more = dict(
        backend="tokenizers", is_local=False, clean_up_tokenization_spaces=True, model_max_length=64, errors="x"
    )
    more |= dict(added_tokens_decoder={"0": {}}, additional_special_tokens=[], sp_model_kwargs={}, legacy=False)
    write(
        siglip, tokenizer_config__json={"tokenizer_class": "SiglipTokenizer", **more, "special_tokens_map_file": "/a"}
    )
    assert tokenizer_files.from_transformers(siglip, 8, "siglip") == plain


def test_copy(bert, siglip, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    assert tokenizer_files.copy("clip", target) == "clip" and not list(target.iterdir())
    assert tokenizer_files.copy(f"wordpiece:{bert}/vocab.txt?cased=true", target) == "wordpiece:vocab.txt?cased=true"
    spec = f"sentencepiece:{siglip}/spiece.model?pad_id=1"
    assert tokenizer_files.copy(spec, target) == "sentencepiece:spiece.model?pad_id=1"
    assert tokenizer_files.copy(spec, siglip) == "sentencepiece:spiece.model?pad_id=1", "onto itself"
    write(bert, merges__txt="#version: 0.2\na b</w>\n")
    write(bert, vocab__json={"a": 0, "b</w>": 1, "ab</w>": 2, "<|startoftext|>": 3, "<|endoftext|>": 4})
    assert tokenizer_files.copy(f"bpe:{bert}/vocab.json", target) == "bpe:vocab.json"
    assert {path.name for path in target.iterdir()} == {"vocab.txt", "spiece.model", "vocab.json", "merges.txt"}
    assert tokenizers.build(f"bpe:{target}/vocab.json")("AB", 4).tolist() == [[3, 2, 4, 4]]
    with pytest.raises(UserError, match="there is no file"):
        tokenizer_files.copy("json:/nowhere/tokenizer.json", target)


def test_a_run_keeps_its_tokenizer(bert, two_tower, tmp_path):
    vocab, workdir = bert / "vocab.txt", tmp_path / "run"
    (workdir / "checkpoints").mkdir(parents=True)
    spec = f"wordpiece:{vocab}?cased=true"
    assert tokenizer_files.kept(spec, workdir) == spec and tokenizer_files.kept("emoji", workdir) == "emoji"
    tokenizer_files.keep("emoji", workdir, begun=False)
    assert not (workdir / "tokenizer").exists()
    vocab.write_text("[PAD]")
    tokenizer_files.keep(spec, workdir, begun=False)
    vocab.write_text("\n".join([*SPECIALS, "red"]))
    for begun in (False, True):  # before the first checkpoint, the file may change
        tokenizer_files.keep(spec, workdir, begun)
    assert tokenizer_files.kept(spec, workdir, missing=True) == spec
    own = tokenizer_files.kept(spec, workdir)
    assert own == f"wordpiece:{workdir}/tokenizer/vocab.txt?cased=true" and tokenizers.build(own).encode("red") == [5]
    (workdir / "config.json").write_text(json.dumps(two_tower.config | {"tokenizer": spec}))
    assert recognize.run_of(workdir).tokenizer == own
    vocab.write_text("[PAD]")
    with pytest.raises(UserError, match=r"vocab\.txt has changed since the run began, which used .*run/tokenizer/v"):
        tokenizer_files.keep(spec, workdir, begun=True)
    vocab.unlink()
    tokenizer_files.keep(spec, workdir, begun=True)
    assert tokenizer_files.kept(spec, workdir, missing=True) == own
    (workdir / "tokenizer" / "vocab.txt").unlink()
    (workdir / "tokenizer" / "vocab.txt").symlink_to(__file__)
    with pytest.raises(UserError, match=r"is a link to .*, outside of the folder"):
        recognize.run_of(workdir)


@pytest.mark.parametrize(
    ("kind", "string", "name"),
    [
        ("clip", "tokenize(9)", "CLIPTokenizer"),
        ("json_clip", "tokenize(9)", "CLIPTokenizer"),
        ("wordpiece", "tokenize(9)", "BertTokenizer"),
        ("wordpiece_cased", "tokenize(9)", "BertTokenizer"),
        ("wordpiece_cased", "lower | tokenize(9, bos=False)", "PreTrainedTokenizerFast"),
        ("siglip", "canonicalize(underscore='drop') | tokenize(9, bos=False)", "SiglipTokenizer"),
        ("siglip", "canonicalize | tokenize(9, bos=False)", "PreTrainedTokenizerFast"),
        ("siglip", "lower | tokenize(9, bos=False)", "PreTrainedTokenizerFast"),
        ("emoji", "tokenize(9, eos=False)", "PreTrainedTokenizerFast"),
    ],
)
def test_what_is_written_reads_as_the_same_ids(kind, string, name, bert, siglip, tmp_path):
    clip_json().save(str(tmp_path / "tokenizer.json"))
    spec = {
        "json_clip": f"json:{tmp_path}/tokenizer.json",
        "wordpiece": f"wordpiece:{bert}/vocab.txt",
        "wordpiece_cased": f"wordpiece:{bert}/vocab.txt?cased=true",
        "siglip": f"sentencepiece:{siglip}/spiece.model?pad_id=1",
    }.get(kind, kind)
    folder = tmp_path / "written"
    folder.mkdir()
    tokenizer_files.to_transformers(spec, string, folder)
    settings = settings_of(folder)
    assert settings["tokenizer_class"] == name and settings["model_max_length"] == 9
    expected, got = encode(spec, string), encode(*tokenizer_files.from_transformers(folder, 9, ""))
    if kind == "clip":  # padded with the end of text
        expected[np.cumsum(expected == 49_407, -1) > 0] = 49_407
        assert settings["pad_token"] == "<|endoftext|>"
    np.testing.assert_array_equal(got, expected)
    tokens = json.loads((folder / "special_tokens_map.json").read_text())
    assert tokens.items() <= settings.items()
    if name == "BertTokenizer":
        assert settings["do_lower_case"] == (kind == "wordpiece") and tokens["cls_token"] == "[CLS]"


def test_a_canonical_text_is_written_into_the_file(tmp_path, bert):
    tokenizer_files.to_transformers(f"wordpiece:{bert}/vocab.txt?cased=true", "canonicalize | tokenize(9)", tmp_path)
    model = hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert model.encode(" The_ FOX!\tes ").ids == model.encode("the_fox es").ids == [2, 5, 7, 1, 3]


@pytest.mark.parametrize("string", ["lower", "template('a {}') | tokenize(8)", "tokenize(8) | keep('token_ids')"])
def test_ops_without_an_equivalent_say_so(string, tmp_path):
    with pytest.raises(UserError, match="has no equivalent in Transformers"):
        tokenizer_files.to_transformers("emoji", string, tmp_path)
