"""Tokenizers as the originals save them, trained on a few texts, and their ids beside ours."""

import io
import json
import random
import re

import numpy as np
import sentencepiece
import tokenizers as hf
import transformers

from vlm_jax.data import ops as text_ops
from vlm_jax.data import tokenizers
from vlm_jax.data.tokenizers import clip

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


def trained(model, trainer, pre_tokenizer):
    """The `model` of tokenizer.json, trained on the texts."""
    tokenizer = hf.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(texts(), trainer)
    return json.loads(tokenizer.to_str())["model"]


def train_sentencepiece(path, model_type="unigram", **options):
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts() * 2), model_writer=stream, vocab_size=600, model_type=model_type,
        minloglevel=2, hard_vocab_limit=False, **(dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1) | options),
    )  # fmt: skip
    path.write_bytes(stream.getvalue())


def save_clip(folder):
    """OpenAI's vocabulary in Transformers' files, as released."""
    vocab, merges = clip.vocabulary()
    vocab |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77).save_pretrained(folder)


def save_roberta(folder, model_type):
    """Of "roberta" or "xlm-roberta"."""
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
    made.save_pretrained(folder)


def save_siglip(folder):
    train_sentencepiece(folder / "spiece.model")
    settings = {"tokenizer_class": "SiglipTokenizer", "pad_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text('{"model_type": "siglip"}')


def save_siglip2(folder):
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
    tokenizer.save_pretrained(folder)


def save_t5(folder):
    train_sentencepiece(folder / "spiece.model")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 0}')
