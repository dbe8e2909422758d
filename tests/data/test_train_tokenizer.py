"""The command that learns a tokenizer."""

import subprocess
import sys

import pytest

from vlm_jax.data import sources, tokenizers, train_tokenizer
from vlm_jax.errors import UserError

CORPUS = [f"{adjective} {noun}" for adjective in ("red", "tired", "sacred") for noun in ("fox", "foxes", "boxes")]


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


def test_corpus_names_the_record_without_the_field(tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"name": {"en": "red fox"}, "tags": ["fox"]}\n{"name": {"de": "Fuchs"}}\n')
    source = sources.open_source(f"jsonl:{tmp_path}/texts.jsonl")
    with pytest.raises(UserError, match=r"record texts.jsonl:2 has no field `name/en` \(there: de\)"):
        train_tokenizer.corpus(source, ["name/en"])


def test_corpus_leaves_out_what_is_no_text(tmp_path, caplog):
    values = ('"red"', "null", "7", '["fox", null, ["x"]]', '"\\ud800"')
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"t": {value}}}\n' for value in values) + "{")
    source = sources.open_source(f"jsonl:{tmp_path}/texts.jsonl")
    assert train_tokenizer.corpus(source, ["t"]) == ["red", "fox"]
    assert "left out 6 records" in caplog.text
